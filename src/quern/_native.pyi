"""The native part: kernels, trellis encoder and CPU engine. Sources: csrc/."""

import collections.abc

import numpy as np
from numpy.typing import NDArray

# Engine (csrc/bind/bind_engine.cc)

class Matrix:
    """A packed weight: the artifact's own bytes, checked. Raises ``ValueError`` where an array has the wrong size."""

    def __init__(
        self,
        kind: str,
        rows: int,
        columns: int,
        codes: NDArray[np.uint8],
        scale: NDArray[np.uint8] | None = None,
        scale_type: str = "float16",
        group: int | None = None,
        one_scale: bool = False,
        zeros: NDArray[np.uint8] | None = None,
        table: NDArray[np.int8] | None = None,
        bits: int = 0,
        window: int = 0,
        tables: int = 1,
        lag: int = 0,
        scale_factor: float = 1.0,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...

class Linear:
    """A matrix with its bias ``(rows,)`` and the sign bits of its inputs' rotation ``(ceil(columns / 8),)``.

    ``fine``: inputs become two int8 numbers each, the ordinary one and what that leaves over. ``input_scale``: of all
    inputs, in place of each group's own; ``one_input_scale``: each token's own, also where the matrix has groups.
    """

    def __init__(
        self,
        matrix: Matrix,
        bias: NDArray[np.float32] | None = None,
        signs: NDArray[np.uint8] | None = None,
        fine: bool = False,
        input_scale: float | None = None,
        one_input_scale: bool = False,
    ) -> None: ...

class Step:
    """What a decoder is a list of. Buffers, which have a row of numbers for each token, are named by their index."""

    @staticmethod
    def embed(table: Matrix, to: int) -> Step:
        """``to`` = the tokens' rows of ``table``."""

    @staticmethod
    def norm(source: int, to: int, weight: NDArray[np.float32], epsilon: float) -> Step:
        """RMSNorm of a row, or of each head by itself where ``weight`` is as short as a head."""

    @staticmethod
    def project(source: int, linears: collections.abc.Sequence[Linear], to: collections.abc.Sequence[int]) -> Step:
        """``to[i]`` = linear ``i`` of ``source``."""

    @staticmethod
    def rotate(heads: int, rotary: int = 0, scale: float = 1.0) -> Step:
        """Heads rotated by position and multiplied by ``scale``, in place."""

    @staticmethod
    def store(layer: int, keys: int, values: int, key_bias: NDArray[np.float32] | None = None, rotary: int = 0) -> Step:
        """Keys, with ``key_bias`` and rotated, and values into what ``layer`` keeps, as csrc/engine/cache.h says."""

    @staticmethod
    def attend(
        layer: int,
        queries: int,
        to: int,
        window: int = 0,
        key_bias: NDArray[np.float32] | None = None,
        rotary: int = 0,
    ) -> Step:
        """Softmax attention over what ``layer`` keeps; ``window``: positions seen back, itself included, 0 all."""

    @staticmethod
    def activate(activation: str, gate: int, up: int | None = None) -> Step:
        """``gate`` = f(gate) * up, or f(gate); f is silu, gelu or gelu_tanh."""

    @staticmethod
    def routed(
        places: tuple[int, int, int, int, int, int],
        per_token: int,
        renormalize: bool,
        activation: str,
        experts: collections.abc.Sequence[tuple[Linear, Linear, Linear]],
        shared_places: tuple[int, int, int, int] | None = None,
        shared: tuple[Linear, Linear, Linear] | None = None,
    ) -> Step:
        """Of each token the ``per_token`` experts (gate, up, down) that its scores' softmax likes best, weighed and added.

        ``places``: the buffers of what experts read, of scores (one an expert, overwritten), gates, ups, what experts make
        (all ``per_token`` times as wide as of one expert), and of the sum; ``shared_places``: of the score of ``shared``,
        whose sigmoid weighs it, of its gate, its up, and what it makes. csrc/engine/routing.h.
        """

    @staticmethod
    def add(source: int, to: int) -> Step:
        """``to`` += ``source``."""

CACHE_BLOCK: int
"""Positions of a page."""

def cache_page_bytes(layers: collections.abc.Sequence[tuple[int, int]], precision: str) -> int:
    """Bytes of a page for layers that keep so many heads of head_dim each."""

class Pool:
    """Pages of keys and values that sequences share. Memory goes back with the last sequence."""

    @property
    def pages(self) -> int: ...
    @property
    def free_pages(self) -> int: ...
    @property
    def sequences(self) -> int:
        """Those that are open."""

    def sequence(self, wide: bool = False) -> Sequence:
        """An empty one; ``wide``: as float32, in twice the pages of a float16 pool."""

class Sequence:
    """Keys and values of one sequence. ``length`` can be cut back, which returns pages; ``rotary`` changed while it is 0.

    Cut back into a page that it shares with another one, it ends in front of that page.
    """

    length: int
    rotary: int
    """Which of the decoder's sets of rotary frequencies the sequence goes by."""
    @property
    def overflowed(self) -> bool:
        """Whether float16 could not hold a key or value."""

    @property
    def wide(self) -> bool: ...
    @property
    def room(self) -> int:
        """Positions that fit, in its own pages and in free ones."""

    def fork(self, length: int) -> Sequence:
        """Another one that begins with the first ``length`` positions, as far as they fill whole pages, which both have."""

    def reserve(self, length: int) -> bool:
        """Take pages for so many positions; False, and none is taken, where there are too few."""

class Decoder:
    """A list of steps and a head. Raises ``ValueError`` where shapes disagree.

    ``widths``: of the buffers. ``layers``: heads and head_dim of the keys and values that each keeps. ``rotaries``: sets of
    ``head_dim / 2`` frequencies (a sequence says which; the last serves where there are fewer), and the factor of cosines
    and sines. ``output``: the buffer that the head reads.
    """

    def __init__(
        self,
        widths: collections.abc.Sequence[int],
        layers: collections.abc.Sequence[tuple[int, int]],
        rotaries: collections.abc.Sequence[tuple[list[list[float]], float]],
        steps: collections.abc.Sequence[Step],
        output: int,
        head: Linear,
        threads: int = 0,
    ) -> None: ...
    @property
    def threads(self) -> int: ...
    def page_bytes(self, precision: str) -> int: ...
    def pool(self, pages: int, precision: str, transformed: bool = True) -> Pool:
        """A pool for sequences of this decoder; ``transformed`` false: integers without the Hadamard transform.

        Raises ``MemoryError`` where the system refuses it.
        """

    def program(self, context: int, switch_length: int) -> tuple[bytes, list[tuple[int, NDArray[np.uint8]]]]:
        """The program of a run file, and the arrays that it names with the places where they begin in the file."""

    def feed(
        self,
        caches: collections.abc.Sequence[Sequence],
        counts: collections.abc.Sequence[int],
        tokens: NDArray[np.int32],
        all: bool,
    ) -> NDArray[np.float32]:
        """Append tokens, ``counts[i]`` of them to ``caches[i]``; logits of every one, or of each sequence's last."""

    def read(
        self,
        caches: collections.abc.Sequence[Sequence],
        counts: collections.abc.Sequence[int],
        tokens: NDArray[np.int32],
        wanted: collections.abc.Sequence[int],
        hidden: bool = False,
    ) -> NDArray[np.float32]:
        """Append tokens as ``feed`` does; of the last ``wanted[i]`` of each the logits, or the head's inputs."""

def likeliest(logits: NDArray[np.float32]) -> int: ...
def sample(logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, place: float) -> int: ...

# Kernels (csrc/bind/bind_kernels.cc)

def isas() -> list[str]:
    """Instruction sets that can run here, best first; the last one is "scalar"."""

def isa() -> str:
    """The one in use: that of the environment variable QUERN_ISA, or the best. Raises ``UserError`` for an unknown one."""

def use_isa(name: str) -> None:
    """Use another one from now on. Raises ``ValueError`` with the list of those that can run here."""

def multiply(matrix: Matrix, inputs: NDArray[np.float32], threads: int = 0) -> NDArray[np.float32]:
    """``inputs`` ``(tokens, columns)`` times the matrix: ``(tokens, rows)``. 0 threads: one for each usable processor."""

def rotate(values: NDArray[np.float32], signs: NDArray[np.uint8], threads: int = 0) -> NDArray[np.float32]:
    """Signs (bit c % 8 of byte c / 8 set: -1) and orthonormal block Hadamard transform of each row."""

def quantize(
    inputs: NDArray[np.float32], group: int, threads: int = 0, given: float = 0.0, whole: bool = False
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]:
    """int8 values ``(tokens, columns)``; their scales and sums ``(tokens, ceil(columns / group))``.

    ``given`` above 0 is the scale of all; ``whole``: a token has one of its own.
    """

def time_multiply(
    matrices: collections.abc.Sequence[Matrix], inputs: NDArray[np.float32], threads: int, repeats: int
) -> list[float]:
    """Seconds of each product; the matrices, all of one shape, take turns. Quantizing the inputs is included."""

def time_read(buffers: collections.abc.Sequence[NDArray[np.uint8]], threads: int, repeats: int) -> list[float]:
    """Seconds of each reading of a buffer; the buffers take turns."""

# Trellis encoder (csrc/bind/bind_trellis.cc)

class TrellisEncoder:
    """Rounds the columns of a matrix to the points of a trellis code, each once and in any order; keeps their codes.

    ``table`` is ``(tables, 2^window)``; ``scales`` ``(rows,)``. ``isa`` names an instruction set of this machine, empty for
    the one in use. Raises ``ValueError`` for a code that there is none of and for arrays of another shape.
    """

    def __init__(
        self, bits: int, lag: int, table: NDArray[np.int8], scales: NDArray[np.float32], columns: int, isa: str = ""
    ) -> None: ...
    def round(self, column: int, values: NDArray[np.float32], decoded: NDArray[np.float32]) -> None: ...
    def round_all(self, weight: NDArray[np.float32], decoded: NDArray[np.float32]) -> None: ...
    def codes(self) -> NDArray[np.uint8]: ...

# Loops over columns (csrc/bind/bind_rounding.cc)

class Columns:
    """Rounds the columns of a block one after the other onto a grid; csrc/rounding/columns.h says what is computed.

    ``codes`` ``(columns, rows)`` are written, ``scale`` and ``zero`` ``(groups, rows)`` read at each call; ``group``:
    columns that share them. ``count`` even steps less a zero point, or listed ``numbers``, with ``limits`` between them and
    a code each in ``ranked``. Raises ``ValueError`` for arrays of another shape.
    """

    def __init__(
        self,
        codes: NDArray[np.uint8],
        scale: NDArray[np.float32],
        zero: NDArray[np.float32],
        group: int,
        count: int,
        limits: NDArray[np.float32],
        numbers: NDArray[np.float32],
        ranked: NDArray[np.uint8],
        isa: str = "",
    ) -> None: ...
    def feed_forward(
        self,
        places: NDArray[np.int32],
        first: int,
        last: int,
        inside: NDArray[np.float32],
        original: NDArray[np.float32],
        target: NDArray[np.float32],
        done: NDArray[np.float32],
        rounded: NDArray[np.float32],
    ) -> None: ...
    def sweep(
        self,
        places: NDArray[np.int32],
        first: int,
        last: int,
        hessian: NDArray[np.float32],
        rounded: NDArray[np.float32],
        residual: NDArray[np.float32],
    ) -> None: ...
