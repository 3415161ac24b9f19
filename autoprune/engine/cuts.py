"""What is present of the prompts of one prefill, and the cuts that a method decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch

from ..contract import MethodContract, Observation, PromptState, Ranking, Selection
from ..parts.transfer import to_device
from .tokens.cut import Columns, Cut, Plan, Stage
from .tokens.layout import Layout
from .tokens.merged import cut_and_merge, with_last_tokens, with_sizes
from .tokens.packing import WORTH_PACKING, Packing
from .tokens.present import NEW, Tokens
from .tokens.sizes import Sizes
from .tokens.summary import Summaries


class Cuts:
    """The tokens that are present at each depth of one prefill, and the cuts that change them.

    Args:
        may_pack: whether ragged batches may be packed into one row; asked at the first cut.

    stages: the layers between two cuts, up to the present ones.
    summaries: what stands for dropped tokens; None without any.
    """

    def __init__(
        self,
        method: MethodContract,
        layout: Layout,
        state: PromptState,
        device: torch.device,
        may_pack: Callable[[], bool],
    ):
        self.method, self.layout, self.state = method, layout, state
        self.stages = [Stage(0, Tokens.of(layout, device))]
        form, prompts = method.summary, state.prompts
        self.summaries = (
            None if form is None else Summaries(form, prompts.num_visual, prompts.required)
        )
        self._ask_may_pack = may_pack
        # Cuts that are decided and still to be made, by layer.
        self._decided: dict[int, Cut] = {}
        self._schedule: tuple[list[list[int]], list[int], Sizes, list[int]] | None = None

    @property
    def present(self) -> Stage:
        """The stage of the layers that come next."""
        return self.stages[-1]

    @property
    def tokens(self) -> Tokens:
        """Those that are present."""
        return self.present.tokens

    @property
    def packing(self) -> Packing | None:
        """How hidden states are packed at present; None where they are [batch, n, hidden size]."""
        return self.present.packing

    @cached_property
    def _may_pack(self) -> bool:
        return self._ask_may_pack()

    def decide(self, seen: Observation, hidden: torch.Tensor) -> torch.Tensor:
        """Ask the method about a cut; hidden states as they are, or behind a cut that makes new ones."""
        index, ends = seen.cut, seen.required
        if self.summaries and (stays := self.summaries.slots(self.tokens)) is not None:
            seen.required = stays if ends is None else ends | stays
        elif self.tokens.bias is not None:
            seen.sizes = self.tokens.bias.gather(1, self.tokens.slots).exp()
        answer = self.method.select(seen, self.state)
        if isinstance(answer, Ranking):
            self._follow(index, answer, ends, hidden.dtype)
        elif answer is not None and not self._keeps_all(answer):
            self._check(index, answer)
            selection, forced = with_last_tokens(self.tokens, answer, self.layout.ends_visual)
            if not self._keeps_all(selection):
                self._refuse_two_decisions(index)
                return self._select(index, selection, forced, ends, hidden)
        return hidden

    def make_due(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states behind the cut before layer `index` that was decided earlier, if there is one."""
        due = self._decided.pop(index, None)
        return hidden if due is None else self._cut(due, hidden)

    def stage_of(self, layer: int) -> Stage:
        """The tokens that layer `layer` ran on."""
        return next(stage for stage in reversed(self.stages) if stage.first_layer <= layer)

    def _follow(
        self, index: int, ranking: Ranking, ends: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        """Plan all cuts that follow from a ranking; `ends` as for `_plan`."""
        self._refuse_two_decisions(index)
        layers, sizes = self._sizes(index)
        due = [i for i, layer in enumerate(layers) if index <= layer < ranking.until]
        if not due:
            return
        depths = range(due[0], due[-1] + 1)
        plan = self._plan(ranking.scores, ends, sizes, depths, dtype)
        cuts = plan.cuts([layers[i] for i in due])
        self._decided = {cut.stage.first_layer: cut for cut in cuts}

    def _select(
        self,
        index: int,
        selection: Selection,
        forced: torch.Tensor | None,
        ends: torch.Tensor | None,
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """Make a cut that a method has decided by itself; `forced` is as `with_last_tokens` gives it, `ends` as
        for `_plan`.
        """
        if self.summaries:
            return self._summarise(index, selection, ends, hidden)
        if selection.merged is not None:
            return self._merge(index, selection, forced, hidden)
        tokens, packing = with_sizes(self.tokens, selection), self.packing
        kept, counts = selection.kept[:, : max(selection.counts)], list(selection.counts)
        if min(counts) < max(counts):
            own = to_device(np.arange(max(counts)) < np.array(counts)[:, None], kept.device)
            kept = kept.where(own, -1)
        sizes = Sizes(tokens, packing, np.array([counts]), self._may_pack)
        plan = Plan(tokens, packing, tokens.ranks_of(kept), sizes, range(1))
        (due,) = plan.cuts([index])
        new = self._cut(due, hidden)
        if selection.states is None:
            return new
        # Rows of the kept tokens, old and new.
        width = kept.shape[1]
        real = np.arange(width) < np.array(counts)[:, None]
        chosen = to_device(np.flatnonzero(real), kept.device)
        place = tokens.slots.gather(1, kept.clamp(min=0))
        row = plan.place[0].gather(1, place).flatten().index_select(0, chosen).to(new.device)
        states = selection.states[:, :width].flatten(0, 1).to(new)
        states = states.index_select(0, chosen.to(new.device))
        rows = new.flatten(0, 1)
        if forced is not None:
            stays = forced[:, :width].flatten().index_select(0, chosen)[:, None].to(new.device)
            states = torch.where(stays, rows.index_select(0, row), states)
        return rows.index_copy(0, row, states).view(new.shape)

    def _cut(self, due: Cut, hidden: torch.Tensor) -> torch.Tensor:
        """Make a cut that only drops tokens."""
        packing = self.packing
        self._enter(due.stage)
        source = due.source.to(hidden.device)
        if due.mean is None and len(hidden) == 1 and self.tokens.batch == 1:
            return hidden.index_select(1, source)
        rows = hidden.flatten(0, 1).index_select(0, source)
        if due.mean is not None:
            padded = hidden if packing is None else packing.unpack(hidden)
            rows.index_copy_(0, due.mean.rows.to(rows.device), due.mean.of(padded))
        return self._in_form(rows)

    def _summarise(
        self, index: int, selection: Selection, ends: torch.Tensor | None, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Make such a cut where summaries take in what is dropped."""
        assert self.summaries is not None
        if any(x is not None for x in (selection.merged, selection.states, selection.sizes)):
            raise ValueError(
                f"{type(self.method).__name__} merges dropped tokens itself, so there is nothing for a summary "
                "to stand for; use it without a summary"
            )
        tokens, kept = self.tokens, selection.kept
        # In a batch of several methods some plan and others do not.
        plans: Sequence[list[int] | None] = self.state.schedule or [None] * tokens.batch
        planned = [None if plan is None else plan[index] for plan in plans]
        new = self.summaries.missing(tokens, selection.counts, planned)
        counts = np.array(selection.counts) + new
        # A place more takes padding.
        scores = torch.zeros(tokens.batch, max(tokens.counts) + 1, device=kept.device)
        scores.scatter_(1, kept.where(kept >= 0, scores.shape[1] - 1), 1.0)
        sizes = Sizes(tokens, self.packing, counts[None], self._may_pack)
        (due,) = self._plan(scores[:, :-1], ends, sizes, range(1), hidden.dtype).cuts([index])
        return self._cut(due, hidden)

    def _merge(
        self, index: int, selection: Selection, forced: torch.Tensor | None, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Make a cut that puts new tokens in the place of dropped ones."""
        merged, before, width = selection.merged, self.packing, self.tokens.width
        assert merged is not None
        ends = None if forced is None else self.layout.ends_visual
        tokens, source = cut_and_merge(self.tokens, selection, ends)
        batch, device = tokens.batch, source.device
        rows = [hidden.flatten(0, 1), merged.hidden.flatten(0, 1)]
        # From places in each prompt to rows of all of them.
        place = before.place if before else _count(batch, width, 0, device)
        new = _count(batch, merged.hidden.shape[1], len(rows[0]), device)
        source = torch.cat([place, new], dim=1).gather(1, source)
        if selection.states is not None:
            states = selection.states[:, : max(tokens.counts)]
            changed = _count(batch, states.shape[1], sum(map(len, rows)), device)
            if forced is not None:
                # Such a token is the last visual one of its prompt, behind new ones, too.
                last = to_device([n - 1 for n in tokens.counts], device)[:, None]
                place = torch.arange(changed.shape[1], device=device)
                stays = (place == last) & forced.any(dim=1, keepdim=True)
                changed = torch.where(stays, source.gather(1, tokens.slots), changed)
            source = tokens.spread(changed, source)
            rows.append(states.flatten(0, 1))
        packing, columns = None, tokens.column.flatten()
        if self._may_pack and tokens.waste >= WORTH_PACKING:
            packing = Packing.of(tokens.lengths, tokens.width, device)
            source, columns = packing.pack(source)[0], packing.pack(tokens.column)[0]
        prompt = torch.arange(batch, device=device)[:, None].expand(-1, tokens.width)
        shared = Columns(
            columns,
            lambda: prompt.flatten() if packing is None else packing.pack(prompt)[0],
            padded=packing is None and tokens.padded,
        )
        self._enter(Stage(index, tokens, packing, shared, slice(0, len(columns))))
        pool = torch.cat([r.to(hidden) for r in rows])
        return self._in_form(pool.index_select(0, source.flatten().to(pool.device)))

    def _plan(
        self,
        scores: torch.Tensor,
        ends: torch.Tensor | None,
        sizes: Sizes,
        depths: range,
        dtype: torch.dtype,
    ) -> Plan:
        """Cuts that keep the tokens with the best scores [batch, V].

        Args:
            ends: bool [batch, V], the last tokens of prompts that end with their picture; None without any.
        """
        tokens, standing = self.tokens, None
        counts = sizes.counts[depths.start : depths.stop]
        if tokens.ragged:
            scores = scores.where(tokens.slot_mask, float("-inf"))
        stays = ends
        if self.summaries:
            # A summary without room gives way to the last token, so that is known before it is ranked.
            self.summaries.give_way(counts)
            if (own := self.summaries.slots(tokens)) is not None:
                stays = own if ends is None else ends | own
        if stays is not None:
            # A prompt whose scores are not finite keeps these, too; NaN would stand before infinity.
            finite = torch.finfo(scores.dtype)
            scores = scores.nan_to_num(finite.min, finite.max, neginf=float("-inf"))
            scores = scores.masked_fill(stays.to(scores.device), float("inf"))
        order = scores.sort(dim=1, descending=True, stable=True).indices
        if self.summaries:
            order = self.summaries.lead(tokens, order, counts)
            standing = self.summaries.standing(tokens, counts, dtype)
        return Plan(tokens, self.packing, tokens.ranks(order), sizes, depths, standing)

    def _sizes(self, index: int) -> tuple[list[int], Sizes]:
        """The layers before which the schedule falls, and what is left there."""
        schedule, made = self.state.schedule, self._schedule
        if made is not None and made[0] == schedule:
            # What is present must be what the schedule left.
            passed = [i for i, layer in enumerate(made[1]) if layer < index]
            left = made[2].counts[passed[-1]].tolist() if passed else made[3]
            if left == self.tokens.counts:
                return made[1], made[2]
        counts = self._checked(schedule, index)
        before = np.concatenate([np.array(self.tokens.counts)[None], counts[index:-1]])
        layers = (index + np.flatnonzero((counts[index:] < before).any(axis=1))).tolist()
        sizes = Sizes(self.tokens, self.packing, counts[layers], self._may_pack)
        own = [list(row) for row in schedule or []]
        self._schedule = own, layers, sizes, list(self.tokens.counts)
        return layers, sizes

    def _checked(self, schedule: list[list[int]] | None, index: int) -> np.ndarray:
        """The schedule as int [layers, batch], from layer `index` on no more than is present."""
        tokens, depth = self.tokens, self.state.shape.num_layers
        shape = () if schedule is None else np.shape(schedule)
        if shape != (tokens.batch, depth):
            raise ValueError(
                f"{type(self.method).__name__} ranks at cut {index}, so state.schedule must hold "
                f"[{tokens.batch} prompts, {depth} layers], got {list(shape) or schedule}"
            )
        counts = np.array(schedule).T
        counts[index:] = np.maximum(counts[index:], self.state.prompts.required or 0)
        before = np.concatenate([np.array(tokens.counts)[None], counts[index:-1]])
        if (counts[index:] > before).any() or counts.min() < 0:
            raise ValueError(
                f"{type(self.method).__name__} ranks at cut {index}, so state.schedule must not rise from "
                f"{tokens.counts} tokens on, got {schedule}"
            )
        return counts

    def _refuse_two_decisions(self, index: int) -> None:
        if self._decided:
            raise ValueError(
                f"{type(self.method).__name__} decides cut {index}, but its last ranking was to hold until cut "
                f"{max(self._decided) + 1} or further; rank with a smaller `until`"
            )

    def _enter(self, stage: Stage) -> None:
        before = self.stages[-1]
        if before.columns is not stage.columns:
            # What was taken for its depths is read no more.
            for earlier in self.stages:
                earlier.columns = None
        self.stages.append(stage)

    def _in_form(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of hidden states as the layers take them."""
        return rows.view(1 if self.packing is not None else self.tokens.batch, -1, rows.shape[-1])

    def _keeps_all(self, selection: Selection) -> bool:
        return selection.merged is None and list(selection.counts) == self.tokens.counts

    def _check(self, index: int, selection: Selection) -> None:
        for prompt, (new, old) in enumerate(zip(selection.counts, self.tokens.counts, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(
                    f"{type(self.method).__name__} keeps {new} of {old} visual tokens of prompt {prompt} "
                    f"at cut {index}; a cut can only keep between 0 and all of them"
                )
        if not _are_sizes(selection.sizes) or (
            selection.merged is not None and not _are_sizes(selection.merged.sizes)
        ):
            raise ValueError(
                f"{type(self.method).__name__} gives sizes at cut {index} that are not finite and above 0; a "
                "token counts for itself with 1"
            )
        batch, most = len(selection.counts), max(selection.counts)
        shapes = ("kept", selection.kept), ("states", selection.states), ("sizes", selection.sizes)
        for what, given in shapes:
            if given is not None and (len(given) != batch or given.shape[1] < most):
                raise ValueError(
                    f"{type(self.method).__name__} gives {what} of shape {list(given.shape)} at cut {index}, "
                    f"but keeps up to {most} tokens; expected [{batch}, that many or more], padding last"
                )

    def restore(self, states: torch.Tensor, stage: Stage) -> torch.Tensor:
        """Hidden states of a stage in the prompt's own columns, [batch, S, hidden size]."""
        tokens, length = stage.tokens, self.layout.real.shape[1]
        if stage is self.stages[0]:
            return states
        if stage.packing is not None:
            states = stage.packing.unpack(states)
        column = tokens.column
        if len(states) == 1 and not (tokens.padded or tokens.has_new):
            full = states.new_zeros(1, length, states.shape[2])
            return full.index_copy_(1, column[0].to(states.device), states)
        # A column more takes what has none.
        column = column.where(column >= 0, length)
        if tokens.index_with_new is not None:
            column = column.where(tokens.index_with_new != NEW, length)
        full = states.new_zeros(states.shape[0], length + 1, states.shape[2])
        first = torch.arange(0, len(full) * (length + 1), length + 1, device=states.device)
        row = (column.to(states.device) + first[:, None]).flatten()
        full.flatten(0, 1).index_copy_(0, row, states.flatten(0, 1))
        return full[:, :length]


def _are_sizes(sizes: torch.Tensor | None) -> bool:
    """Whether all are numbers above 0. On a GPU that is not asked, as it would have to be waited for."""
    if sizes is None or sizes.device.type != "cpu":
        return True
    return bool((torch.isfinite(sizes) & (sizes > 0)).all())


def _count(batch: int, width: int, start: int, device: torch.device) -> torch.Tensor:
    """start, start + 1, ... as [batch, width]."""
    return torch.arange(start, start + batch * width, device=device).view(batch, width)
