"""How the workers of one run agree: a sum over all of them, and nothing else."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist


class Workgroup:
    """A run of one worker: every sum is what it was."""

    rank = 0
    size = 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by its sum over all workers and return it."""
        return tensor

    def slice(self, count: int) -> range:
        """The indices of a global list that this worker owns: contiguous, sizes differ by at most 1."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, values: Tensor, indices: Sequence[int], count: int) -> Tensor:
        """The global [count, ...] tensor whose rows `indices` are held here and the rest elsewhere."""
        whole = values.new_zeros((count, *values.shape[1:]))
        whole[torch.as_tensor(indices, dtype=torch.long, device=values.device)] = values
        return self.sum_(whole)

    def share(self, data: bytes) -> bytes:
        """The bytes of rank 0, on every worker; what the others pass is ignored."""
        if self.size == 1:
            return data
        held = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.rank == 0 and data else None
        length = int(self.sum_(torch.tensor([0 if held is None else len(held)])).item())
        whole = torch.zeros(length, dtype=torch.uint8) if held is None else held
        return self.sum_(whole).numpy().tobytes() if length else b""

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients over all workers, in one transfer; a missing gradient counts as zero."""
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.size == 1:
            return
        flat = self.sum_(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)


class TorchWorkgroup(Workgroup):
    """The workers of an initialised torch.distributed process group (gloo or nccl)."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._device = torch.device(device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """All-reduce in place; a CPU tensor crosses through the group's device."""
        moved = tensor.to(self._device)
        dist.all_reduce(moved)
        if moved is not tensor:
            tensor.copy_(moved)
        return tensor
