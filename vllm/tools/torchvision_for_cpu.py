"""Lets torchvision's build for CUDA be imported beside a torch for the CPU.

The usual package index gives torchvision for CUDA alone. Beside a torch for the CPU its import fails, as two
operators that it describes do not exist. No model here runs them. So they are declared before it is imported.
`make test-vllm` puts this file into the environment, with a line in a `.pth` file that imports it.
"""

import importlib.abc
import sys


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares the operators the first time that torchvision is looked for; finds nothing itself."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            sys.meta_path.remove(self)
            import torch

            type(self).library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return


sys.meta_path.insert(0, DeclareOperators())
