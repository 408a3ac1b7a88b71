"""Text that travels with every Python installation, split once and for all into two parts.

The bundled model (``models/python-7m``) was trained on the running Python's standard library,
minus the modules and help topics named here.  Measuring on :func:`held_out_text` is therefore
always measuring on text the model has not seen, while :func:`training_calibration_text` offers
text of the same kind that it *has* seen and that nothing is ever measured on.

Nothing but the standard library is imported, so the split can be read anywhere.  The text itself
comes from the running interpreter: its wording, and hence any figure measured on it, differs a
little from one Python version to the next.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

#: Top-level modules kept out of training, present in CPython 3.11 through 3.14.
HELD_OUT_MODULES: tuple[str, ...] = (
    "argparse.py",
    "cmd.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "queue.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
)

#: Top-level modules that calibration may use: part of the training text, never of the measured text.
CALIBRATION_MODULES: tuple[str, ...] = (
    "functools.py",
    "inspect.py",
    "subprocess.py",
    "threading.py",
    "typing.py",
)

#: A help topic is held out when the CRC-32 of its name leaves this remainder by this modulus.
TOPIC_MODULUS, TOPIC_REMAINDER = 7, 2


def topic_is_held_out(name: str) -> bool:
    """Tell whether the ``pydoc`` help topic called ``name`` belongs to the held-out part."""
    return zlib.crc32(name.encode("utf-8")) % TOPIC_MODULUS == TOPIC_REMAINDER


def help_topics() -> dict[str, str]:
    """Return every ``pydoc`` help topic of the running Python, in the order of their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError(
            "this Python lacks pydoc_data/topics.py, which holds part of the held-out text; "
            "install the complete standard library (on Debian: libpython3-stdlib)"
        ) from error
    return {name: topics[name] for name in sorted(topics)}


def held_out_text() -> list[tuple[str, str]]:
    """Return the held-out documents as (name, text): the modules first, then the help topics."""
    documents = _read_modules(HELD_OUT_MODULES, "held-out")
    topics = [(name, text) for name, text in help_topics().items() if topic_is_held_out(name)]
    documents += [(f"pydoc_data/topics.py:{name}", text) for name, text in topics]
    return documents


def training_calibration_text() -> list[tuple[str, str]]:
    """Return documents from the training part, as (name, text), for calibrating a quantizer."""
    return _read_modules(CALIBRATION_MODULES, "calibration")


def _read_modules(names: tuple[str, ...], purpose: str) -> list[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    missing = [name for name in names if not (library / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the {purpose} text needs {', '.join(missing)} in {library}, "
            "and this Python installation does not carry the source text there"
        )
    return [(name, (library / name).read_text(encoding="utf-8")) for name in names]
