"""The target map of a model of transformers from its structure: of every class that has no map of its own.

The config of the model around a module says whether it is of the text, of a tower or of what connects them. In their
blocks, the classes around it say whether it is attention or MLP, or else its shape. Experts that routers choose are a
part of their own; shared ones, which all tokens pass, are of the MLP. Left out are embeddings and heads, what chooses
(routers), other modalities, and convolutions that are not pointwise: some classes read the weights of such convolutions
themselves.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from dora_mm.core.targets import TargetMap, adaptable
from dora_mm.core.wrappers.experts import DoRAExperts, ExpertProjection, is_transposed
from dora_mm.core.wrappers.separation import with_projections
from dora_mm.registries.target_maps import DERIVED_PARTS as PARTS

NAME = "derived"
DEFAULT = ("text.attn", "text.mlp")
ATTENTION = ("text.attn", "cross", "vision.attn")  # the parts that every block has one of
NO_COUNTS: dict[str, int] = {}  # of a block in which any number of layers may be adapted
AREAS = {  # of a model inside another one, by the name of its config there; the first one counts
    "other": "audio|speech|vq|dit|protein",
    "vision": "vision|image",
    "connector": "qformer|perceiver|adapter",
    "text": "text|decoder|llm",
}
KINDS = {  # of a layer, by a class around it or the name of that in the model; the nearest one counts
    "router": "router|indexer|altup",  # what chooses gets no gradient, or rounds what it computes
    "mlp": r"mlp|ffn|feed_?forward|expert|moe_?block|moe$|dense\w*act",
    "attn": r"attn|attention|mixer|delta_?net|short_?conv",
}
CROSS = "cross|encoder_attn|encdec|encoder_decoder"
SHARED = "shared"
PIXELS = "stem|embed|patch_(conv|proj)|downsample"  # in a tower: what makes tokens of an image, and fewer of them
POOLED = "pool"  # in a tower: a head for one feature of an image, which no language model reads
UNUSED = "audio|speech|generation"  # beside the towers: what answers about images do not need
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def derive(model: Any) -> TargetMap:
    """Derives the target map of a model of transformers.

    Args:
        model: The model, which may be on the meta device.

    Raises:
        ValueError: It has no blocks with attention that read text.
    """
    if not hasattr(getattr(model, "config", None), "to_diff_dict"):
        raise ValueError(f"no target map can be derived for {type(model).__name__}: it is no model of transformers")
    structure = _Structure(model)
    groups: dict[str, dict[str, list[str]]] = {part: defaultdict(list) for part in PARTS}
    for path in structure.modules:
        if part := structure.part(path):
            groups[part][numbered(path)].append(path)
    if not groups["text.attn"] or not hasattr(model.config.get_text_config(), "vocab_size"):
        raise ValueError(f"no target map can be derived for {type(model).__name__}: it has no blocks that read text")
    parts = {part: _patterns(names, structure.modules) for part, names in groups.items() if names}
    prefixes = (re.match(r"(.*\.)?N(?=\.)", name) for part in ATTENTION for name in groups[part])
    blocks = dict.fromkeys(f"re:{_any_number(found[0])}" for found in prefixes if found)
    default = [part for part in DEFAULT if part in parts]
    return TargetMap(NAME, parts, dict.fromkeys(blocks, NO_COUNTS), default)


def about_left_out(model: nn.Module, taken: Mapping[str, Any]) -> str:
    """A line on the layers that a map does not take, but for embeddings and experts, and on other 3-D parameters.

    Args:
        model: The model.
        taken: The modules that the map takes, by path.
    """
    found = Counter()
    for path, module in with_projections(dict(model.named_modules())).items():
        if path in taken or isinstance(module, nn.Embedding | ExpertProjection) or _is_experts(path, module):
            continue
        if adaptable(module):
            found[numbered(path)] += 1
        elif _has_stacks(module):
            found[f"{numbered(path)} (3-D)"] += 1
    names = [f"{name} ({count})" if count > 1 else name for name, count in found.items()]
    return f"left out: {', '.join(names) or 'none'}"


def about_experts(model: nn.Module, trained: Iterable[nn.Parameter] = ()) -> str | None:
    """A line on the routed experts that stay as they are; None: there are none.

    Args:
        model: The model, adapted or not.
        trained: Parameters that are trained themselves.
    """
    num_all, known = sum(p.numel() for p in model.parameters()), {id(p) for p in trained}
    known |= {id(layer.weight) for layer in model.modules() if isinstance(layer, DoRAExperts)}
    found, count, remedy = Counter(), 0, ""
    for path, module in model.named_modules():
        untouched = [p for p in module.parameters(recurse=False) if id(p) not in known]
        if untouched and _is_experts(path, module) and not re.search(SHARED, path):
            found[numbered(path)] += 1
            count += sum(p.numel() for p in untouched)
            remedy = remedy or ("" if is_transposed(module) is None else "; the part text.experts adapts them")
    if not found:
        return None
    names = ", ".join(f"{name} ({number})" if number > 1 else name for name, number in found.items())
    return f"experts that stay as they are: {names}; {count:,} parameters, {count / num_all:.1%} of the model{remedy}"


def _is_experts(path: str, module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts in one parameter."""
    return (
        not adaptable(module)
        and _has_stacks(module)
        and re.search("expert", f"{path} {type(module).__name__}", re.I) is not None
    )


def _has_stacks(module: nn.Module) -> bool:
    """Whether a module has matrices that are stacked in a 3-D parameter of its own."""
    return any(p.dim() == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))


def numbered(path: str) -> str:
    """A path with N for each number in it."""
    return ".".join("N" if piece.isdigit() else piece for piece in path.split("."))


def _patterns(groups: Mapping[str, list[str]], modules: Mapping[str, nn.Module]) -> list[str]:
    """Patterns that match the paths of these groups and no other: one for each group, if numbers may be any."""
    found = []
    for name, paths in groups.items():
        alike = [path for path in modules if numbered(path) == name]
        found += [f"re:{_any_number(name)}"] if alike == paths else [f"re:{re.escape(path)}" for path in paths]
    return found


def _any_number(name: str) -> str:
    """A regular expression for the paths that `numbered` makes this name of."""
    return r"\.".join(r"\d+" if piece == "N" else re.escape(piece) for piece in name.split("."))


class _Structure:
    """The structure of a model: its modules by path, and the part that each belongs to."""

    def __init__(self, model: Any):
        self.modules = with_projections(dict(model.named_modules()))
        self.head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        attention = [path for path, module in self.modules.items() if _kind_of(type(module).__name__) == "attn"]
        self.lists = {above for path in attention for above in _enclosing_lists(path)}
        self.areas = self._areas_of_models(model)

    def part(self, path: str) -> str | None:
        """The part of a module, or None: it is left out."""
        module = self.modules[path]
        if not path or module is self.head or not _is_linear(module):
            return None
        root = next(above for above in _above(path) if above in self.areas)
        area, below = self.areas[root], path.removeprefix(root)
        in_blocks = any(prefixes in self.lists for prefixes in _enclosing_lists(path) if len(prefixes) > len(root))
        if isinstance(module, CONVOLUTIONS):
            is_block = area == "vision" and any(_enclosing_lists(path)) and not re.search(PIXELS, below)
            return f"vision.{self._kind(path, root) or 'mlp'}" if is_block else None
        if in_blocks and area in ("text", "vision"):
            is_routed = isinstance(module, ExpertProjection) and not re.search(SHARED, below)
            kind = "experts" if is_routed else self._kind(path, root) or self._kind_by_shape(module, root)
            if kind == "attn" and area == "text" and self._crosses(path, root):
                return "cross"
            return f"{area}.{kind}" if kind in ("attn", "mlp", "experts") else None
        return "connector" if self._connects(path, root, area) else None

    def _connects(self, path: str, root: str, area: str) -> bool:
        """Whether a layer outside of blocks is between a tower and the text; of texts without a config, by its name."""
        below = path.removeprefix(root)
        if area == "vision":
            pools = any(re.search(POOLED, name, re.I) for name in self._prefix_of(path, root))
            return not pools and not re.search(PIXELS, below)
        if area == "text":
            return not root and re.search(AREAS["vision"] + "|visual", below) is not None
        return area == "connector" and not re.search(UNUSED, below)

    def _kind(self, path: str, root: str) -> str | None:
        """The kind of block that a layer is part of: "attn", "mlp" or "router"; None where no name tells."""
        if _kind_of(path.rpartition(".")[2]) == "router":
            return "router"
        return next((kind for name in self._prefix_of(path, root) if (kind := _kind_of(name))), None)

    def _kind_by_shape(self, module: nn.Module, root: str) -> str | None:
        """The kind "mlp" for a layer from the width of the text to a larger one, or back."""
        width = getattr(getattr(self.modules[root], "config", None), "hidden_size", None)
        if not isinstance(module, nn.Linear) or width is None:
            return None
        sizes = module.in_features, module.out_features
        return "mlp" if min(sizes) == width < max(sizes) else None

    def _crosses(self, path: str, root: str) -> bool:
        return any(re.search(CROSS, name, re.I) for name in self._prefix_of(path, root))

    def _prefix_of(self, path: str, root: str) -> Iterator[str]:
        """The classes around a module and their names in the model, up to one at `root`, the nearest first."""
        for above in _above(path)[1:]:
            if len(above) <= len(root):
                return
            yield type(self.modules[above]).__name__
            yield above.rpartition(".")[2]

    def _areas_of_models(self, model: Any) -> dict[str, str]:
        """The area of each model inside, by path, and of the model itself: of the text if that has no other config."""
        configs = list(_inner_configs(model.config))
        by_id, by_class = ({key(inner): area for inner, area in configs} for key in (id, type))
        found = {"": "connector" if "text" in by_class.values() else "text"}
        for path, module in self.modules.items():
            config = getattr(module, "config", None)
            area = by_id.get(id(config)) or by_class.get(type(config))
            if area and self._is_model(path, module) and area != _nearest(found, path):
                found[path] = area
        return found

    def _is_model(self, path: str, module: nn.Module) -> bool:
        """Whether a module with a config is a model: single layers may have one, too."""
        has_blocks = any(prefixes.startswith(f"{path}.") for prefixes in self.lists)
        return bool(path) and (has_blocks or hasattr(module, "get_input_embeddings"))


def _nearest(areas: Mapping[str, str], path: str) -> str:
    """The area that a path is in."""
    return next(areas[above] for above in _above(path) if above in areas)


def _inner_configs(config: Any) -> Iterator[tuple[Any, str]]:
    """The configs inside a config, and what each is of: by its name, or a tower by its patches."""
    for name, inner in vars(config).items():
        if hasattr(inner, "to_diff_dict"):
            area = next((area for area, names in AREAS.items() if re.search(names, name)), None)
            if area or hasattr(inner, "patch_size"):
                yield inner, area or "vision"
            yield from _inner_configs(inner)


def _kind_of(name: str) -> str | None:
    return next((kind for kind, names in KINDS.items() if re.search(names, name, re.I)), None)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of several outputs, or a convolution that is one over channels."""
    if isinstance(module, nn.Embedding) or not adaptable(module):
        return False
    if isinstance(module, CONVOLUTIONS):
        return set(module.kernel_size) == {1} and module.groups == 1
    return getattr(module, "out_features", None) != 1


def _above(path: str) -> list[str]:
    """A path and those of all modules around it, the nearest first, the model itself, "", last."""
    pieces = path.split(".")
    return [".".join(pieces[:length]) for length in range(len(pieces), -1, -1)]


def _enclosing_lists(path: str) -> list[str]:
    """The paths of the numbered lists that a module is in, the nearest first."""
    return [above.rpartition(".")[0] for above in _above(path) if above.rpartition(".")[2].isdigit()]
