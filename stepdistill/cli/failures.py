"""What a command prints when something is wrong: one sentence, or, if the fault is ours, a traceback and a request."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import yaml
from safetensors import SafetensorError

from stepdistill.files.words import shortened, visible

LONGEST_LINE = 2_000
REPORT_IT = "This is a bug in stepdistill. Please report it with the lines above and the command."


@contextlib.contextmanager
def failures_as_sentences(program: str, config: str | None = None) -> Iterator[None]:
    """Turn what is no fault of ours into a message of ``program`` and exit code 2; a fault of ours keeps its traceback.

    Args:
        program: the first word of the message.
        config: the configuration that is at work, if there is one; the message names it.
    """
    sys.excepthook = _traceback_and_request
    warnings.formatwarning = _warning_in_one_line
    try:
        yield
    except KeyboardInterrupt:
        _stop(program, "interrupted", code=130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (torch.OutOfMemoryError, MemoryError) as error:
        _stop(program, f"out of memory: {error}; try a smaller batch size", config)
    except RecursionError:
        _stop(program, "the input is nested too deeply", config)
    except OSError as error:
        where = [] if error.filename is None else [str(error.filename)]
        _stop(program, ": ".join([*where, error.strerror or str(error)]), config)
    except (ValueError, yaml.YAMLError, SafetensorError, zipfile.BadZipFile) as error:
        _stop(program, str(error), config)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("stepdistill"):
            raise
        _stop(program, str(error), config)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what torch says on a CPU, by no class of its own
            raise
        _stop(program, f"out of memory: {error}; try a smaller batch size", config)


def _stop(program: str, text: str, config: str | None = None, code: int = 2) -> NoReturn:
    """Print a message, of which all lines but the first are indented, and exit; libraries' messages may be long."""
    begin = program if config is None or str(config) in text else f"{program} {config}"
    lines = [visible(shortened(line, LONGEST_LINE)) for line in text.splitlines()]
    print(visible(begin) + ": " + "\n  ".join(lines), file=sys.stderr)
    raise SystemExit(code)


def _traceback_and_request(*fault: Any) -> None:
    sys.__excepthook__(*fault)
    print(REPORT_IT, file=sys.stderr)


def _warning_in_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    del filename, lineno, line
    return f"{category.__name__}: {visible(str(message))}\n"
