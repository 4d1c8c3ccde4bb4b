"""What weights are, as a key for what was computed with them."""

import hashlib

import torch


def module_digest(module: torch.nn.Module) -> str:
    """The identity of a network: SHA-256 over the names, dtypes, shapes and bytes of its weights (1 s for SDXL's)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
