"""dora-mm ask: what a model says about images, or of text alone, without and with an adapter."""

import logging
from collections.abc import Iterator, Sequence

from dora_mm import formats
from dora_mm.adapting.files import load_trained, saved_config, seed_of
from dora_mm.config.paths import find_path, resolve_model, resolve_path
from dora_mm.config.vl import DecodeConfig, TrainVLConfig
from dora_mm.data.images.decoders import SUFFIXES
from dora_mm.data.images.frames import VIDEO_SUFFIXES, check_video, is_video
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.answers import Answer, texts_of
from dora_mm.data.vl.example import IMAGE, VIDEO, Example, Turn, escaped
from dora_mm.data.vl.splits import usual_opening
from dora_mm.models.vl.families import load_for_questions
from dora_mm.models.vl.vl_model import VLModel
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.day import today
from dora_mm.utils.devices import default_device
from dora_mm.utils.messages import for_terminal

log = logging.getLogger(__name__)


def main(
    model: str,
    images: list[str],
    question: str,
    *,
    then: Sequence[str] = (),
    system: str | None = None,
    adapter: str | None = None,
    max_new_tokens: int | None = None,
    dtype: str | None = None,
    revision: str | None = None,
) -> None:
    """Prints a model's answer to a question; with an adapter, the bare model's and the adapted one's.

    With the adapter of a run, the model is loaded as the run's config says (dtype, sizes of images, quantisation), and
    both are prompted as in training: with the prompt of its task, and the start of its conversations (a system turn, a
    line break behind images).

    Args:
        model: A folder of `save_pretrained`, or a hub name; or the folder of a VL-BART, with an adapter.
        images: The images and videos that the question is about, in order; none for a question of text alone.
        question: The question.
        then: Questions that follow in the same conversation, each after the model's own answer to the one before.
        system: The system turn; None: that of the run, "": none.
        adapter: A run directory, or an adapter's folder.
        max_new_tokens: The longest answer in tokens; None: that of the run's task, 256 of a conversation.
        dtype: The dtype of the weights; None: that of the run, else that of the model's config.
        revision: A commit, branch or tag of a hub model; None: its main branch.

    Raises:
        ValueError: The model, an image or the adapter cannot be used, or they do not belong together.
    """
    named = question.lower().endswith((*SUFFIXES, *VIDEO_SUFFIXES))
    if named and (find_path(question) or len(question.split()) == 1):
        raise ValueError(f"QUESTION is missing: {question} is the name of a file, and the question comes behind it")
    path, files = resolve_model(model, "MODEL"), [str(resolve_path(image, "IMAGE").absolute()) for image in images]
    for file in files:
        (check_video if is_video(file) else load_rgb)(file)
    questions = [question, *then]
    if not all(map(str.strip, questions)):
        raise ValueError("QUESTION is empty" if not question.strip() else "--then is empty")
    folder = formats.adapter_folder(resolve_path(adapter, "--adapter")) if adapter else None
    run = saved_config(folder) if folder else None
    vl = load_for_questions(
        path,
        (run.model, run.vision) if run else None,
        seed=seed_of(folder) if folder and run else 0,
        trained_tower=bool(run and run.adapter.vision_parts),
        given={key: value for key, value in (("dtype", dtype), ("revision", revision)) if value},
        device=default_device(),
        today=today(),
    )
    _check(vl, path, files, then, system)
    task = requested_task(vl, run)
    usual, behind = _opening_of(run, task) if run is not None and vl.converses else (None, "")
    opening = (usual if system is None else system, behind)
    answer = vl.answerer(task, DecodeConfig(max_new_tokens=max_new_tokens), ())
    bare = list(map(for_terminal, conversed(answer, questions, files, *opening)))
    if folder is None:
        print("\n".join(bare))
        return
    load_trained(vl, folder, backend="auto")
    adapted = map(for_terminal, conversed(answer, questions, files, *opening))
    for prompt, before, after in zip(questions, bare, adapted, strict=True):
        if then:
            print(f"question:        {for_terminal(prompt)}")
        print(f"without adapter: {before}")
        print(f"with adapter:    {after}")


def _check(vl: VLModel, path: str, files: Sequence[str], then: Sequence[str], system: str | None) -> None:
    """Checks that the model accepts these images, follow-up questions and system turn."""
    if files and not vl.reads_images:
        raise ValueError(f"{path} reads no images: ask it without {files[0]}")
    if len(files) > 1 and not vl.reads_several:
        raise ValueError(f"{path} reads one image with a question, and {len(files)} are given")
    if vl.converses:
        return
    if not files and vl.reads_images:
        raise ValueError(f"{path} has no chat template, and answers no question without an image")
    if then or system:
        key = "--then" if then else "--system"
        raise ValueError(f"{key}: {path} has no chat template, and reads a single question")


def requested_task(vl: VLModel, run: TrainVLConfig | None) -> str:
    """The task whose prompt a question gets: the run's task, conversations first, if it has questions."""
    tasks = [task.task for task in run.data.all_tasks] if run else []
    prompt = [task for task in tasks if TASKS[task].chosen_from is None and "{text}" in (TASKS[task].prompt or "")]
    return min(prompt, key=lambda task: TASKS[task].kind != "conversations", default=vl.question_task)


def _opening_of(run: TrainVLConfig, task: str) -> tuple[str | None, str]:
    """The system turn of a run's conversations, which its data files have, and what is behind their images."""
    found = next((each for each in run.data.all_tasks if each.task == task), None)
    if found is None or TASKS[task].kind != "conversations":
        return None, ""
    try:
        return usual_opening(found)
    except ValueError as error:
        log.warning("asked without a system turn, since the run's data cannot be read (--system gives one): %s", error)
        return None, ""


def conversed(
    answer: Answer, questions: Sequence[str], files: Sequence[str], system: str | None, behind: str = ""
) -> Iterator[str]:
    """The answers to questions of one conversation, one after the other.

    Args:
        answer: Answers examples.
        questions: The questions.
        files: The images, which are shown with the first question.
        system: The system turn; None or "": none.
        behind: What is written behind each image: a line break, or nothing.
    """
    if len(questions) == 1 and not system and not behind:
        yield texts_of(answer([Example("of the command", tuple(files), questions[0])], "/"))[0]
        return
    turns = [Turn("system", system, False)] if system else []
    for number, question in enumerate(questions):
        shown = [f"{VIDEO if is_video(file) else IMAGE}{behind}" for file in files] if number == 0 else []
        turns.append(Turn("user", "".join([*shown, escaped(question)]), False))
        (found,) = texts_of(answer([Example("of the command", tuple(files), question, turns=tuple(turns))], "/"))
        turns.append(Turn("assistant", escaped(found), False))
        yield found
