"""Which launches share compiled code, and what they hand to it; no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from leap_kernels import triton_launch
from leap_kernels.triton_launch import Launcher

ALIGNED = torch.zeros(64)


class Kernel:
    """Counts what Triton would compile, and keeps what compiled code is started with."""

    def __init__(self) -> None:
        self.through_triton: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []

    def __getitem__(self, _grid: object) -> Any:
        def launch(*arguments: Any, num_warps: int) -> SimpleNamespace:
            self.through_triton.append((*arguments, num_warps))
            run = lambda *started: self.direct.append(started[9:])  # noqa: E731
            return SimpleNamespace(run=run, function=0, packed_metadata=())

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 0))
    monkeypatch.setattr(triton_launch, "driver", driver)
    monkeypatch.setattr("torch.cuda.current_device", lambda: -1)
    assert ALIGNED.data_ptr() % 16 == 0
    return Kernel()


def test_other_numbers_start_the_same_code(kernel: Kernel) -> None:
    launch, single = Launcher(kernel), ALIGNED[1:2]
    for number in range(1000):
        launch(1, (ALIGNED,), (64,), (True,), 4, numbers=(number, number / 2), singles=(single,))
    assert len(kernel.through_triton) == 1
    assert len(launch._compiled) == 1
    assert kernel.through_triton[0][2:] == (64, 0, 0.0, True, 4)
    assert kernel.direct[-1] == (ALIGNED.data_ptr(), single.data_ptr(), 64, 999, 499.5, True)


@pytest.mark.parametrize(
    "other",
    [
        {"tensors": (ALIGNED.double(),)},
        {"integers": (32,)},
        {"constants": (False,)},
        {"warps": 8},
        {"types": (torch.float32, torch.float16)},
    ],
)
def test_what_code_depends_on_is_compiled_for(kernel: Kernel, other: dict[str, Any]) -> None:
    launch = Launcher(kernel)
    base: dict[str, Any] = {"tensors": (ALIGNED,), "integers": (64,), "constants": (True,), "warps": 4}
    for _ in range(2):
        launch(1, **base)
        launch(1, **{**base, **other})
    assert len(kernel.through_triton) == 2
    assert len(kernel.direct) == 2


def test_tensors_that_lie_anywhere_go_through_triton(kernel: Kernel) -> None:
    launch = Launcher(kernel)
    for _ in range(2):
        launch(1, (ALIGNED[1:],), (63,), (), 4)
    assert len(kernel.through_triton) == 2


def test_kernels_say_the_types_of_their_numbers() -> None:
    """Else the code of the first launch would have the numbers of the first launch built in, or their width."""
    from leap_kernels.adam8bit_triton import adam8bit_kernel
    from leap_kernels.mask_backward_triton import mask_backward_kernel
    from leap_kernels.mask_forward_triton import mask_forward_kernel

    for kernel in (adam8bit_kernel, mask_backward_kernel, mask_forward_kernel):
        for parameter in kernel.params:
            if parameter.annotation_type or parameter.name in ("shift_ptr", "stats_grad_ptr"):
                assert parameter.do_not_specialize, parameter.name
            elif not parameter.is_constexpr:
                assert parameter.name.endswith("_ptr") or parameter.name in ("count", "skip"), parameter.name
