"""dora-mm configs: the packaged configs, the command of each, and what it is for."""

import re

from dora_mm.config.paths import packaged_configs


def main() -> None:
    """Prints them by folder: the path that commands take, and what the head begins with."""
    found = {name: purpose(file.read_text(encoding="utf-8")) for name, file in packaged_configs().items()}
    width = max(map(len, found))
    print("Packaged configs, which commands take from any folder (dora-mm new writes one for your own images):\n")
    for name, what in found.items():
        print(f"{name:<{width}}  {what}")


def purpose(text: str) -> str:
    """The command and what the head begins with."""
    head = [line.removeprefix("#").strip() for line in text.split("\npipeline:")[0].splitlines()]
    command, about = head[0].split()[1], " ".join(head[1:]).strip()
    return f"{command:<8}  {re.split(r'[.:;,(] | [(]', about)[0].removesuffix('.')}"
