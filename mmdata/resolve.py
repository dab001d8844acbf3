"""What a machine settles for a model stage, once per dataset: weights, batch shape, precision, device class.

Kept in `state/resolved-<operator>-<hash>.json`, created once; later runs take it from there, so that a set's identity
does not depend on the machine that asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping

from mmdata.errors import RecipeError, StoreError
from mmdata.plan import PlannedStep, Resolved, base_identity
from mmdata.store import Store

__all__ = ["Resolver", "needs_machine", "require_device", "resolve", "resolved_before"]


def needs_machine(step: PlannedStep) -> bool:
    """Whether anything of the stage is settled on a machine: a model's shape, or weights not seen yet."""
    contract = step.contract
    assert contract is not None
    return contract.batch_shape is not None or any(w.fingerprint is None for w in contract.weights)


def resolved_before(store: Store, step: PlannedStep, base: str) -> Resolved | None:
    """What an earlier run settled for this stage, or what needs no settling; None when a machine must be asked."""
    contract = step.contract
    assert contract is not None
    if not needs_machine(step):
        return Resolved(precision=contract.precision)
    data = store.read_if_there(_name(step, base))
    if data is None:
        return None
    try:
        return Resolved(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{_name(step, base)} of {store.url} is damaged ({error}); remove it and run again") from None


def resolve(store: Store, step: PlannedStep, base: str, device: str, ask: Callable[[], Resolved]) -> Resolved:
    """What stands in `state/`, else what `ask` settles on a worker, written there first.

    A CPU is not asked: its shape is the contract's, unless weights have to be brought.
    """
    found = resolved_before(store, step, base)
    if found is not None:
        return found
    contract = step.contract
    assert contract is not None
    is_plain = device == "cpu" and all(w.fingerprint is not None for w in contract.weights)
    settled = Resolved(contract.batch_shape, contract.precision) if is_plain else ask()
    store.create(_name(step, base), json.dumps(vars(settled), sort_keys=True).encode())
    # Another run may have been first: what stands in the folder counts.
    return resolved_before(store, step, base) or settled


class Resolver:
    """What machines settle for the stages of one run: asked of a worker once, then read from `state/`.

    `ask(step, name)` has a worker settle a stage; `name` is that of the question. `device` tells the workers' class.
    """

    def __init__(self, store: Store, device: Callable[[], str], ask: Callable[[PlannedStep, str], Resolved]) -> None:
        self._store, self._device, self._ask = store, device, ask
        self._early: dict[int, Resolved] = {}  # position → what was settled before its turn

    def bring(self, steps: Iterable[PlannedStep]) -> None:
        """Have weights brought that were not seen yet, in front of work that would be in vain without them.

        RecipeError or MissingExtra where they are not to be had. Files that a path names were read by the plan.
        """
        for step in steps:
            if step.kind == "stage" and step.contract and any(w.fingerprint is None for w in step.contract.weights):
                self._early[step.position] = self._ask(step, f"weights of step {step.position}")

    def of(self, step: PlannedStep, sets: Mapping[int, str]) -> Resolved:
        """Shape, precision, device and weights of a stage; `sets` as for `base_identity`."""
        if not needs_machine(step):
            return Resolved(precision=step.contract.precision if step.contract else None)
        base = base_identity(step, sets)
        found = resolved_before(self._store, step, base)
        if found is not None:
            return found

        def ask() -> Resolved:
            return self._early.get(step.position) or self._ask(step, base)

        return resolve(self._store, step, base, self._device(), ask)


def require_device(step: PlannedStep, resolved: Resolved, device: str, allow_mixed: bool) -> None:
    """RecipeError when a set was computed on another device class than the one there is now."""
    if resolved.device != device and needs_machine(step) and not allow_mixed:
        raise RecipeError(
            f"step {step.name} is computed on {resolved.device} in this dataset, and {device} may differ in the last "
            f"bits; use --device {resolved.device}, or --allow-mixed to mix them"
        )


def _name(step: PlannedStep, base: str) -> str:
    assert step.operator is not None
    return f"state/resolved-{step.operator.name}-{base}.json"
