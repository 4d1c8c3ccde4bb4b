"""Suggestions for unknown arguments: values without --set, flags of other trainers, misspelled options."""

import re
import shlex
from collections.abc import Sequence

from dora_mm.registries.other_trainers import key_of, other_meaning, outside, settings_of
from dora_mm.registries.renamed import OPTIONS
from dora_mm.utils.messages import nearest


def right_form(unknown: Sequence[str], argv: Sequence[str], usage: str) -> str:
    """How arguments that a parser does not know are written here; empty where nothing is known of them.

    Args:
        unknown: The arguments, such as `train.steps=20` or `--max_train_steps`.
        argv: All arguments, in which a flag is followed by its value.
        usage: The usage of the command, with its options.
    """
    pairs = [text for text in unknown if "=" in text and not text.startswith("-")]
    flags = [text for text in unknown if text.startswith("--")]
    renamed = [(flag, OPTIONS[flag.partition("=")[0]]) for flag in flags if flag.partition("=")[0] in OPTIONS]
    dotted = [flag for flag in flags if "." in flag.partition("=")[0]]
    if dotted:
        return f"values of a config follow --set: --set {shlex.join(_as_setting(flag, argv) for flag in dotted)}"
    if pairs:
        return f"values of a config follow --set: --set {shlex.join(pairs)}"
    if renamed:
        return " and ".join(f"{flag.partition('=')[0]} is called {now} now" for flag, now in renamed)
    meant = {flag: _settings(flag, argv) for flag in flags if key_of(flag)}
    if meant:
        names = [flag.partition("=")[0] for flag in meant]
        settings = [setting for settings in meant.values() for setting in settings]
        others = "".join(other_meaning(name, argv) for name in names)
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} --set {shlex.join(settings)} here{others}"
    if others := [f"{flag.partition('=')[0]}: {use}" for flag in flags if (use := outside(flag))]:
        return "; ".join(others)
    options = re.findall(r"--[\w-]+", usage)
    slips = [f"there is no {flag}{close}" for flag in flags if (close := nearest(flag, options))]
    return "; ".join(slips)


def _settings(flag: str, argv: Sequence[str]) -> list[str]:
    return settings_of(flag.partition("=")[0], _value(flag, argv))


def _as_setting(flag: str, argv: Sequence[str]) -> str:
    """`--train.steps 5` or `--train.steps=5` as `--set` takes it."""
    value = _value(flag, argv)
    return f"{flag.removeprefix('--').partition('=')[0]}={'VALUE' if value is None else value}"


def _value(flag: str, argv: Sequence[str]) -> str | None:
    """The value of a flag, behind its `=` or after it; None: it has none."""
    _, equals, value = flag.partition("=")
    if equals:
        return value
    following = [*argv[list(argv).index(flag) + 1 :], "--"][0]
    return None if following.startswith("--") else following
