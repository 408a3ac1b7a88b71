"""What a recipe's ``tuning`` does between rounding a block and storing it (``quantization/training/reconstruction.py``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quern.codecs.base import CODECS, codec_of
from quern.core.errors import UserError
from quern.core.plan import Plan
from quern.core.recipe import Recipe
from quern.core.recipe_parts import Tuning
from quern.core.results import TunedBlock
from quern.core.units import significant
from quern.pipeline.blockwise.job import Job, keeping
from quern.pipeline.blockwise.reference_stream import ReferenceStream
from quern.quantization.block import RoundedLinear
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.calibration.block import Block
from quern.quantization.calibration.drift import HELD_OUT
from quern.quantization.calibration.hessian import norm_weights
from quern.quantization.training.inputs import InputRounding
from quern.quantization.training.loop import RATES
from quern.quantization.training.reconstruction import Reconstruction, Streams, Tuned
from quern.quantization.training.student import StudentBlock, TrainedWeight
from quern.rotation.rotation import rotate


def check(recipe: Recipe, plan: Plan) -> None:
    """Raise ``UserError`` where the recipe's tuning has nothing that it may train."""
    if recipe.tuning is None:
        return
    said = f"recipe {recipe.name!r}: tuning"
    if kept := keeping(plan):
        raise UserError(f"{said} changes values, and rounding of {kept[0]} keeps them. Leave out one of the two")
    codecs = {linear.scheme.codec for linear in plan.quantized().values()}
    unable = sorted(name for name in codecs if not CODECS.get(name).trains_codes)
    if recipe.tuning.train == "codes" and unable:
        able = ", ".join(name for name in CODECS.names() if CODECS.get(name).trains_codes)
        raise UserError(
            f"{said} cannot train codes of codec {', '.join(unable)}; those of {able} it can. Set tuning: "
            "{train: scales}, which leaves codes as they are"
        )


def check_sequences(recipe: Recipe, sequences: Tensor | None) -> None:
    """Raise ``UserError`` where none of the calibration sequences ``(sequences, time)`` can be held out."""
    if recipe.tuning is not None and sequences is not None and len(sequences) < 2:
        raise UserError(
            f"recipe {recipe.name!r}: tuning holds out one of {HELD_OUT} calibration sequences, at least one, and there is "
            f"but one of {sequences.shape[1]} tokens. Calibrate on more tokens, or by a smaller sequence_length"
        )


def notes(tuned: Sequence[TunedBlock]) -> list[str]:
    """What should be known of blocks whose tuning did not go as it should."""
    return [
        f"tuning of block {one.block} stopped: {one.problem}. The best state was kept; try a smaller learning_rate"
        for one in tuned
        if one.problem is not None
    ]


@dataclass(frozen=True)
class BlockTuning:
    """A block with its linears rounded."""

    job: Job
    tuning: Tuning
    block: Block
    reference: ReferenceStream
    source: ActivationFile
    """What the block reads behind quantized ones."""
    stored_dtype: Callable[[str], torch.dtype]
    """The checkpoint's dtype of a parameter, by its name relative to the block."""

    def run(
        self, rounded: Sequence[RoundedLinear], gradients: Mapping[str, Tensor]
    ) -> tuple[list[RoundedLinear], TunedBlock | None]:
        """The linears as tuned, which the block has got then, as it has norms and biases; None where nothing is quantized.

        ``gradients``: Fisher token weights by linear, where the recipe has them.
        """
        if not rounded:
            return [], None
        job, index = self.job, self.block.spec.index
        weights = dict(job.workers.map(self._trained, list(rounded)))
        self.reference.forget_block()  # what latent weights begin at is all that was wanted of it
        student = StudentBlock(job.architecture, index, weights, self._read, job.compute_dtype, self.block.time)
        rate = self.tuning.learning_rate or RATES[self.tuning.train]
        loop = Reconstruction(student, self._streams(gradients), self.tuning.passes, rate, job.seed, job.workers)
        task = job.progress.task(f"tuning block {index}", loop.steps)
        found = loop.run(task.advance)
        task.done()
        job.progress.log(
            f"block {index}: error of its outputs on held-out text {significant(found.before)} -> {significant(found.after)}"
        )
        record = TunedBlock(
            block=index, before=found.before, after=found.after, steps=found.steps, best_step=found.best_step,
            problem=found.problem,
        )  # fmt: skip
        return self._taken_over(rounded, weights, found), record

    def _trained(self, linear: RoundedLinear) -> tuple[str, TrainedWeight]:
        """What is trained of a linear; latent weights begin at those that were rounded, but for drift."""
        codec, shape, signs = codec_of(linear.weight.scheme), linear.weight.shape, linear.input_signs
        weight = None
        if self.tuning.train == "codes":
            weight = self.reference.weight(linear.name).float().cpu()
            weight = weight if signs is None else rotate(weight, signs)
        mode = linear.plan.activations.mode
        rounding = None
        if mode != "none":
            rounding = InputRounding(mode, linear.input_scale, linear.plan.activations.group_size, signs)
        return linear.name, TrainedWeight(codec.trainable(shape, linear.weight.parts, weight), signs, rounding)

    def _read(self, name: str) -> Tensor:
        own = name.removeprefix(self.block.spec.prefix)
        return self.block.module.get_parameter(own).data.to(self.stored_dtype(own)).cpu()

    def _streams(self, gradients: Mapping[str, Tensor]) -> Streams:
        outputs, count = self.reference.outputs, self.source.shape[0]
        weights = self._token_weights(gradients)
        mean = float(weights.double().mean())
        return Streams(
            inputs=lambda place: self.source.read(place, place + 1)[0],
            targets=lambda place: outputs.read(place, place + 1)[0],
            weights=weights / mean if mean > 0 else torch.ones_like(weights),
            held=[place for place in range(count) if place % HELD_OUT == HELD_OUT - 1] or [count - 1],
        )

    def _token_weights(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Of each sequence and token ``(sequences, time)``, as the recipe's calibration weights tokens.

        What the last linear makes is added to the block's output, so that both have one gradient; that of experts is a share
        of it.
        """
        outputs, (count, time, _) = self.reference.outputs, self.source.shape
        if gradients:
            last = [name for group in self.block.spec.stages[-1] for name in group.linears]
            return torch.stack([gradients[name] for name in last]).sum(0).view(count, time)
        if self.job.recipe.calibration.token_weight == "norm":
            return torch.stack([norm_weights(outputs.read(place, place + 1)[0]) for place in range(count)])
        return torch.ones(count, time)

    def _taken_over(
        self, rounded: Sequence[RoundedLinear], weights: dict[str, TrainedWeight], found: Tuned
    ) -> list[RoundedLinear]:
        """``rounded``, and the block, in the state that was best."""
        if not found.parts:
            return list(rounded)
        tuned = []
        for linear in rounded:
            weight = replace(linear.weight, parts=found.parts[linear.name])
            values = weights[linear.name].effective(codec_of(weight.scheme).decode(weight.shape, weight.parts))
            decoded = values.to(linear.decoded)
            self.block.linear(linear.name).weight.data = decoded
            tuned.append(replace(linear, weight=weight, decoded=decoded))
        for name, vector in found.vectors.items():
            parameter = self.block.module.get_parameter(name)
            parameter.data = vector.to(parameter)
        return tuned
