"""Lines of kohya's files of prompts, in which flags follow the prompt."""

import re

IMAGE = re.compile(r"image(_\d+)?")  # image, image_2, ...: a reference each
FLAGS = {"n": "negative_prompt", "w": "width", "h": "height", "s": "steps", "d": "seed", "l": "guidance", "ci": "image"}
_FLAG = re.compile(r"\s--([A-Za-z]+)(?=\s|$)")


def of_line(line: str) -> dict[str, str]:
    """A line of kohya's files of prompts: the prompt, then flags such as `--n blurry --w 832 --d 7`.

    Raises:
        ValueError: It has another flag.
    """
    prompt, *rest = _FLAG.split(f" {line}")
    values = {"prompt": prompt}
    for flag, value in zip(rest[::2], rest[1::2], strict=True):
        column = FLAGS.get(flag.lower())
        if column is None:
            known = ", ".join(f"--{name} ({title})" for name, title in FLAGS.items())
            raise ValueError(f"has --{flag}: the flags of a line are {known}")
        several = sum(IMAGE.fullmatch(name) is not None for name in values) if column == "image" else 0
        values[f"{column}_{several + 1}" if several else column] = value.strip()
    return {name: value for name, value in values.items() if value.strip()}
