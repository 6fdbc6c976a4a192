"""Placement groups of engines whose devices are on several nodes: one per engine, given back when the Dataset has been read.

Ray asks for the arguments of every actor before it starts it; each answer is a new placement group. The actor asks for no GPU of its own: vLLM's
workers take them, one per bundle, and find the group since the actor's children are placed in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.data import Dataset


class EnginePlacement:
    """The placement groups of one pool.

    Args:
        num_gpus: of one engine, each in a bundle of its own.
        num_cpus: of the actor, in the first bundle.
    """

    def __init__(self, num_gpus: int, num_cpus: float) -> None:
        self._bundles = [{"GPU": 1.0, **({"CPU": num_cpus} if number == 0 else {})} for number in range(num_gpus)]
        self._groups: list[Any] = []

    def arguments(self) -> dict[str, Any]:
        """Ray's arguments for the next actor, with a placement group of its own."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group(self._bundles, strategy="PACK")
        self._groups.append(group)
        # Bundle 0, which has the actor's CPU; vLLM wants its driver on a node of the group.
        strategy = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )
        return {"scheduling_strategy": strategy}

    def remove(self) -> None:
        """Gives all groups back, and ends what still runs in them."""
        from ray.util.placement_group import remove_placement_group

        while self._groups:
            remove_placement_group(self._groups.pop())

    def remove_after(self, dataset: Dataset) -> None:
        """Sees to `remove` at the end of each execution of a Dataset or of one made from it, failed or not."""
        from ray.data._internal.execution.execution_callback import ExecutionCallback

        remove = self.remove

        class Remove(ExecutionCallback):  # Ray makes the instance itself, without arguments
            def after_execution_succeeds(self, executor: Any) -> None:
                remove()

            def after_execution_fails(self, executor: Any, error: Exception) -> None:
                remove()

        context = dataset.context
        context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Remove]
