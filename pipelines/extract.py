"""dora-mm extract: a DoRA from two checkpoints, a base model and a model that was fine-tuned from it."""

from dora_mm.config.paths import resolve_model
from dora_mm.formats.commands.extract import Extraction, extract
from dora_mm.formats.commands.inspection import misreaders
from dora_mm.utils.home import expanded
from dora_mm.utils.tables import aligned_columns

SHOWN = 5  # modules whose errors are named


def main(tuned: str, base: str, out: str, *, rank: int, to: str | None = None) -> None:
    """Extracts the adapter, and prints how far off it is.

    Args:
        tuned: The fine-tuned model: a folder, a single-file checkpoint or a hub name.
        base: The model that it was fine-tuned from.
        out: A new file that ends in .safetensors, or a new folder.
        rank: The rank.
        to: A target of `dora-mm convert`; None: diffusers, or PEFT where there is a single model.

    Raises:
        ValueError: A model cannot be read, the two do not belong together, or OUT exists or cannot hold the adapter.
    """
    models = (resolve_model(tuned, "TUNED"), resolve_model(base, "BASE"))
    done = extract(*models, expanded(out), rank=rank, to=to)
    print(report(done))
    if done.usage:
        print(f"\nuse  {done.usage}")
    if to and (others := misreaders(done.files[0], to)):
        print(f"\nnot for  {others}")


def report(done: Extraction) -> str:
    """The file, the counts, the error over all modules, and the modules with the largest ones."""
    lines = [
        *(f"written    {file}, {len(done.errors)} modules" for file in done.files),
        f"unchanged  {done.num_unchanged} modules, which are left out",
    ]
    if done.left_out:
        kinds = "norms, embeddings and stacked weights that differ"
        lines.append(f"left out   {len(done.left_out)} {kinds}, such as {done.left_out[0]}")
    lines.append(f"error      {done.overall:.2%} of the change of the weights is not in the adapter")
    worst = sorted(done.errors.items(), key=lambda item: -item[1])[:SHOWN]
    rows = [("largest errors", ""), *((str(name), f"{error:.2%}") for name, error in worst)]
    return "\n".join(lines) + f"\n\n{aligned_columns(rows, num_text=1)}"
