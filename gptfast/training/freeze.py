"""Training a part of a model: parameters named by patterns keep their values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

_EXAMPLES = 4  # accepted names in a message


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Set `requires_grad=False` for the parameters whose name matches one of the patterns.

    To be called before the optimizer is made: `GPT.configure_optimizers` leaves such parameters out. A parameter that
    has two names, as a tied embedding has "transformer.wte.weight" and "lm_head.weight", matches by either.

    Args:
        model: of any kind.
        patterns: as of file names, `*`, `?` and `[...]`, for whole names: "transformer.h.[0-5].*", "transformer.wte.*".

    Returns:
        The names of the parameters that matched, in the order and the spelling of `named_parameters()`: tied ones once.

    Raises:
        ValueError: a pattern that matches no parameter, or nothing left to train. The model is then as it was.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    found = {id(names[name]) for name in matching(patterns, names, "parameter")}
    parameters = dict(model.named_parameters())
    if not any(p.requires_grad and id(p) not in found for p in parameters.values()):
        raise ValueError(f"patterns {_quoted(patterns)} leave nothing to train; leave out at least one parameter")
    frozen = [name for name, parameter in parameters.items() if id(parameter) in found]
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def matching(patterns: Sequence[str], names: Iterable[str], kind: str) -> list[str]:
    """The names that match at least one of the patterns, in their own order.

    Args:
        patterns: see `freeze`.
        names: those that are accepted.
        kind: what the names are of, for messages.

    Raises:
        ValueError: a pattern that matches none, or a string in the place of a sequence.
    """
    if isinstance(patterns, str):  # its letters would be patterns, and "*" is one that matches everything
        raise ValueError(f"patterns must be a sequence of strings, got {patterns!r}; accepted: [{patterns!r}]")
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no {kind} matches {pattern!r}; accepted: names such as {', '.join(names[:_EXAMPLES])}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _quoted(patterns: Sequence[str]) -> str:
    return ", ".join(map(repr, patterns))
