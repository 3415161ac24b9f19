"""Methods and budgets compared on questions with known answers.

from autoprune import AutoPrune, Budget, tiny
from autoprune.evaluation import Setting, compare, embedded_tasks

model, processor = tiny.load()
settings = [Setting("autoprune", "1/4", AutoPrune(Budget.ratio(1 / 4)))]
rows = compare(model, processor, settings, embedded_tasks(per_kind=20), Path("comparison"))
"""

from .comparison import Options, compare
from .settings import Setting
from .tasks import Task, embedded_tasks, is_right, read_tasks

__all__ = ["Options", "Setting", "Task", "compare", "embedded_tasks", "is_right", "read_tasks"]
