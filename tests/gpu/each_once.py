"""Launch every kernel on small inputs, for a tool that watches memory.

compute-sanitizer --tool memcheck python -m tests.gpu.each_once
compute-sanitizer --tool racecheck python -m tests.gpu.each_once

Both watch every access, so that minutes of tests would be hours.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_optim.coefficients import table
from lowrank_optim.kernels import (
    adam,
    adamw,
    apply,
    cast,
    chosen_adam,
    dct,
    factored_add,
    momentum,
    normalized,
    recursion,
    select,
    symmetric,
)
from lowrank_optim.storage import STATE_DTYPES, storage

DEVICE = "cuda"
HALF = torch.bfloat16


def normal(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Return random numbers."""
    return torch.randn(shape, device=DEVICE).to(dtype)


def kept(name: str, state_dtype: str, shape: tuple[int, ...], *, signed: bool = True) -> dict[str, Tensor]:
    """Return a moment as it is stored."""

    def new(shape: tuple[int, ...], dtype: torch.dtype | None = None, *, host: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=dtype or torch.float32, device=DEVICE)

    return dict(storage(state_dtype).init(name, shape, new, signed=signed))


def products() -> None:
    """Launch the products: whole tiles and a rest, in parts and not, with and without C."""
    for shape in ((2, 128, 128), (2, 130, 70), (1, 48, 5000)):
        x = normal(*shape)
        r = symmetric.symmetric(x, x, gamma=1.0)
        symmetric.symmetric(r, r.mT, r, alpha=0.5, beta=2.0)
    x = normal(1, 512, 512)
    symmetric.symmetric(x, x)
    for n in (16, 64, 100):
        x = normalized.normalized(normal(2, n, 2 * n), eps=0.0, dtype=torch.float32)
        recursion.gram_recursion(x @ x.mT, table("you"))
    cast.cast(normal(3, 1000), torch.float16)


def moments() -> None:
    """Launch the passes over moments, one matrix and several."""
    for state_dtype in STATE_DTYPES:
        for count in (1, 3):
            shape, numbers = (33, 70), list(range(1, count + 1))
            grads = [normal(*shape) for _ in numbers]
            states = [
                kept("exp_avg", state_dtype, shape) | kept("exp_avg_sq", state_dtype, shape, signed=False)
                for _ in grads
            ]
            adam.stored_adam_directions_(
                grads,
                states,
                state_dtype=state_dtype,
                betas=(0.9, 0.99),
                eps=1e-8,
                steps=numbers,
                seeds=numbers,
                dtype=HALF,
            )
            momenta = [kept("momentum_buffer", state_dtype, shape) for _ in grads]
            momentum.normalized_momenta_(
                grads,
                momenta,
                state_dtype=state_dtype,
                momentum=0.9,
                nesterov=True,
                form="ema",
                eps=1e-7,
                seeds=numbers,
                dtype=torch.float16,
            )


def columns() -> None:
    """Launch the DCT, the selection and Adam along what is selected."""
    for dim, shape in ((-1, (40, 256)), (-2, (256, 40))):
        for r in (20, 256):
            coords = (40, r) if dim == -1 else (r, 40)
            states = [
                {"basis_index": torch.arange(r, device=DEVICE).int()}
                | {name: torch.zeros(coords, device=DEVICE) for name in ("exp_avg", "exp_avg_sq")}
                for _ in range(2)
            ]
            for step in (1, 2):
                values, energies = dct.all_dct_energies([normal(*shape) for _ in range(2)], dim, out_dtype=HALF)
                places = select.select_columns_(energies, [state["basis_index"] for state in states])
                chosen_adam.chosen_adam_directions_(
                    values.unbind(), states, places, dim=dim, betas=(0.9, 0.99), eps=1e-8, steps=[step] * 2, dtype=HALF
                )


def weights() -> None:
    """Launch what writes weights, to nearest and by chance."""
    for seed in (None, 5):
        for shape in ((128, 256), (33, 70)):
            weight = normal(*shape)
            apply.apply_(weight, normal(*shape), lr=0.1, weight_decay=0.1, seed=seed, cautious=seed is None)
            factors = normal(shape[0], 20), normal(20, shape[1])
            factored_add.apply_sum_(weight, factors, None, lr=0.1, weight_decay=0.1, seed=seed)
        params = [normal(70), normal(64, 64)]
        states = [[torch.zeros(p.shape, device=DEVICE) for p in params] for _ in range(2)]
        seeds = None if seed is None else [seed, seed + 1]
        numbers = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        adamw.adamw_(params, [p.clone() for p in params], *states, [1, 1], **numbers, seeds=seeds)


PARTS: tuple[Callable[[], None], ...] = (products, moments, columns, weights)

if __name__ == "__main__":
    for part in PARTS:
        part()
        torch.cuda.synchronize()
        print(part.__name__, "done", flush=True)
