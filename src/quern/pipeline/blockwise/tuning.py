"""What a recipe's ``tuning`` does between rounding a block and storing it (``quantization/training/reconstruction.py``)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quern.architectures.base import BlockSpec
from quern.codecs.base import CODECS, codec_of
from quern.codecs.trainable.base import Fixed
from quern.core.errors import UserError
from quern.core.machine.heap import release_freed
from quern.core.plan import Plan
from quern.core.recipe import Recipe
from quern.core.results import TunedBlock
from quern.core.text.units import significant
from quern.pipeline.blockwise.job import Job, keeping
from quern.pipeline.blockwise.reference_stream import ReferenceStream
from quern.quantization.block import RoundedLinear
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.calibration.block import Block
from quern.quantization.calibration.drift import HELD_OUT
from quern.quantization.calibration.hessian import norm_weights
from quern.quantization.training.inputs import InputRounding
from quern.quantization.training.reconstruction import RATES, Reconstruction, Streams, Tuned
from quern.quantization.training.student import StudentBlock, TrainedWeight, Unrounded
from quern.rotation.rotation import rotate


def check(recipe: Recipe, plan: Plan, linears: Collection[str]) -> None:
    """Raise ``UserError`` where the recipe's tuning has something that it may not train among the ``linears`` of blocks."""
    if recipe.tuning is None:
        return
    said = f"recipe {recipe.name!r}: tuning"
    if kept := [name for name in keeping(plan) if name in linears]:
        raise UserError(f"{said} changes values, and rounding of {kept[0]} keeps them. Leave out one of the two")
    codecs = {linear.scheme.codec for name, linear in plan.quantized().items() if name in linears}
    unable = sorted(name for name in codecs if not CODECS.get(name).trains_codes)
    if recipe.tuning.train == "codes" and unable:
        able = ", ".join(name for name in CODECS.names() if CODECS.get(name).trains_codes)
        raise UserError(
            f"{said} cannot train codes of codec {', '.join(unable)}; those of {able} it can. Set tuning: "
            "{train: scales}, which leaves codes as they are"
        )


def checked(sequences: Tensor | None, recipe: Recipe) -> Tensor | None:
    """The calibration ``sequences`` ``(sequences, time)``. Raises ``UserError`` where none of them can be held out."""
    if recipe.tuning is not None and sequences is not None and len(sequences) < 2:
        raise UserError(
            f"recipe {recipe.name!r}: tuning holds out one of {HELD_OUT} calibration sequences, at least one, and there is "
            f"but one of {sequences.shape[1]} tokens. Calibrate on more tokens, or by a smaller sequence_length"
        )
    return sequences


def notes(tuned: Sequence[TunedBlock]) -> list[str]:
    """What should be known of blocks whose tuning did not go as it should."""
    return [
        f"tuning of block {one.block} stopped: {one.problem}. The best state was kept; try a smaller learning_rate"
        for one in tuned
        if one.problem is not None
    ]


def token_weights(job: Job, spec: BlockSpec, gradients: Mapping[str, Tensor], reference: ReferenceStream) -> Tensor:
    """How much each token's output of a block counts, float32 ``(sequences, time)``, as the recipe weights tokens.

    ``gradients``: Fisher token weights by linear. What the last linear makes is added to the block's output, so that both
    have one gradient; that of experts is a share of it.
    """
    outputs = reference.outputs
    count, time, _ = outputs.shape
    if gradients:
        last = [name for group in spec.stages[-1] for name in group.linears]
        weights = torch.stack([gradients[name] for name in last]).sum(0).view(count, time)
    elif job.recipe.calibration.token_weight == "norm":
        weights = torch.stack([norm_weights(outputs.read(place, place + 1)[0]) for place in range(count)])
    else:
        weights = torch.ones(count, time)
    mean = float(weights.double().mean())
    return weights / mean if mean > 0 else torch.ones(count, time)


class BlockTuning:
    """A block in the course of its rounding."""

    def __init__(
        self,
        job: Job,
        block: Block,
        reference: ReferenceStream,
        source: ActivationFile,
        weights: Tensor,
        stored_dtype: Callable[[str], torch.dtype],
    ) -> None:
        """``source``: what the block reads behind quantized ones; ``weights``: ``token_weights``; ``stored_dtype``: the
        checkpoint's, of a parameter by its name relative to the block."""
        assert job.recipe.tuning is not None
        self.job, self.tuning, self.block, self.reference = job, job.recipe.tuning, block, reference
        self._stored_dtype = stored_dtype
        self._before: dict[str, Tensor] = {}
        outputs, count = reference.outputs, len(weights)
        self.streams = Streams(
            inputs=lambda place: source.read(place, place + 1)[0],
            targets=lambda place: outputs.read(place, place + 1)[0],
            weights=weights,
            held=[place for place in range(count) if place % HELD_OUT == HELD_OUT - 1] or [count - 1],
        )

    def remember(self, weights: Mapping[str, Tensor]) -> None:
        """What linears are just before they are rounded: latent weights begin there."""
        if self.tuning.train == "codes" and self.tuning.between:  # else they are what the unquantized block has
            self._before |= {name: weight.clone() for name, weight in weights.items()}

    def between(self, rounded: Sequence[RoundedLinear]) -> None:
        """Train the linears that are not ``rounded`` yet, norms and biases; the block has them then as they are best."""
        done = {linear.name: linear for linear in rounded}
        if not self.tuning.between or not done:
            return
        weights = {}
        for spec in self.block.spec.linears:
            if spec.name in done:
                linear = done[spec.name]
                codec = codec_of(linear.weight.scheme)
                fixed = Fixed(codec, linear.weight.shape, linear.weight.parts)
                weights[spec.name] = TrainedWeight(fixed, linear.input_signs, input_rounding(linear))
            elif self.job.plan[self.block.spec.prefix + spec.name].quantized:
                weights[spec.name] = TrainedWeight(Unrounded(self.block.linear(spec.name).weight.data))
        found = self._run(weights, self.tuning.between, self.tuning.learning_rate or RATES["codes"])
        for name, parts in found.parts.items():
            if name not in done:
                weight = self.block.linear(name).weight
                weight.data = parts["weight"].to(weight)
        self._take_vectors(found)

    def finish(self, rounded: Sequence[RoundedLinear]) -> tuple[list[RoundedLinear], TunedBlock | None]:
        """The linears as tuned, which the block has got then, as it has norms and biases; None where none is quantized."""
        if not rounded:
            return [], None
        job, index = self.job, self.block.spec.index
        weights = dict(job.workers.map(self._trained, list(rounded)))
        self._before.clear()
        self.reference.forget_block()  # what latent weights begin at is all that was wanted of it
        release_freed()
        rate = self.tuning.learning_rate or RATES[self.tuning.train]
        found = self._run(weights, self.tuning.passes, rate)
        told = f"{significant(found.before)} -> {significant(found.after)}"
        job.progress.log(f"block {index}: error of its outputs on held-out text {told}")
        return self._taken_over(rounded, weights, found), TunedBlock(
            block=index, before=found.before, after=found.after, steps=found.steps, best_step=found.best_step,
            problem=found.problem,
        )  # fmt: skip

    def _run(self, weights: Mapping[str, TrainedWeight], passes: int, rate: float) -> Tuned:
        job, spec = self.job, self.block.spec
        student = StudentBlock(job.architecture, spec.index, weights, self._read, job.compute_dtype, self.block.time)
        loop = Reconstruction(student, self.streams, passes, rate, job.seed, job.workers)
        task = job.progress.task(f"tuning block {spec.index}", loop.steps)
        found = loop.run(task.advance)
        task.done()
        return found

    def _trained(self, linear: RoundedLinear) -> tuple[str, TrainedWeight]:
        """What is trained of a linear; latent weights begin at those that were rounded, but for drift."""
        codec, shape, signs = codec_of(linear.weight.scheme), linear.weight.shape, linear.input_signs
        weight = None
        if self.tuning.train == "codes":
            before = self._before.pop(linear.name, None)
            weight = (self.reference.weight(linear.name) if before is None else before).float().cpu()
            weight = weight if signs is None else rotate(weight, signs)
        trainable = codec.trainable(shape, linear.weight.parts, weight)
        return linear.name, TrainedWeight(trainable, signs, input_rounding(linear))

    def _read(self, name: str) -> Tensor:
        own = name.removeprefix(self.block.spec.prefix)
        return self.block.module.get_parameter(own).data.to(self._stored_dtype(own)).cpu()

    def _taken_over(
        self, rounded: Sequence[RoundedLinear], weights: Mapping[str, TrainedWeight], found: Tuned
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
        self._take_vectors(found)
        return tuned

    def _take_vectors(self, found: Tuned) -> None:
        for name, vector in found.vectors.items():
            parameter = self.block.module.get_parameter(name)
            parameter.data = vector.to(parameter)


def input_rounding(linear: RoundedLinear) -> InputRounding | None:
    """What the linear makes of its inputs at run time."""
    mode = linear.plan.activations.mode
    if mode == "none":
        return None
    return InputRounding(mode, linear.input_scale, linear.plan.activations.group_size, linear.input_signs)
