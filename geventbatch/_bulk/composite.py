"""A composite: what the operations of a component are applied to. It is the resources of its keys.

Each operation gets its own of them. An undo copies and restores a composite as it does a resource: it brings back those
resources that operations have touched, and no others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from geventbatch._core.operation import BROKEN, STARTED
from geventbatch.errors import CannotUndo

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, MutableMapping

    from geventbatch._bulk.component import Component
    from geventbatch._core.attempt import Attempt


@final
class At:
    """The callable of an operation in a component: it picks the resources of its keys."""

    __slots__ = ("__wrapped__", "keys", "several")

    def __init__(self, keys: tuple[Hashable, ...], operation: Callable[..., Any], *, several: bool) -> None:
        """Apply *operation* to the tuple of resources at *keys*; or, unless it takes *several*, to the only one."""
        self.keys = keys
        self.several = several
        self.__wrapped__ = operation

    def __call__(self, composite: Any, *args: Any) -> Any:
        """Apply it."""
        resources = composite.pick(self.keys)
        composite = None  # an error leads to this frame, which must not lead to other callers' resources
        return self.__wrapped__(resources if self.several else resources[0], *args)


@final
class Composite:
    """The resources of a component by key; and what brings those back that operations have touched, and no others.

    As a whole it is copied and restored by `Undo`, like a resource.
    """

    __slots__ = (
        "_attempt",
        "_component",
        "_kept",
        "_lost",
        "_may_share",
        "_memories",
        "_resources",
        "_saved",
        "_touched",
    )

    # -- mutable state: while it can be restored -------------------------------------------------------------
    _attempt: Attempt | None  # set if resources are copied before operations touch them
    _memories: dict[Hashable, Any]  # by key: what restores it
    _may_share: dict[Hashable, None]  # touched keys that an operation has had together with others
    _kept: dict[Hashable, Any]  # by key: its state at the last copy, if it was touched before
    _lost: dict[Hashable, BaseException]  # by key: why it cannot be copied

    def __init__(self, component: Component, resources: MutableMapping[Any, Any]) -> None:
        """Take the keys of *component* out of *resources*, in which restored ones take the place of others."""
        self._component = component
        self._saved = resources
        self._resources = {key: resources[key] for key in component.loads}
        # -- mutable state ---------------------------------------------------------------------------------
        self._attempt = None
        self._touched: dict[Hashable, None] | None = None  # since the last copy; None until it can be restored

    def pick(self, keys: tuple[Hashable, ...]) -> tuple[Any, ...]:
        """Return the resources at *keys*, which are those of the operation at hand from now on."""
        component = self._component
        component.key, component.named = keys[0], keys
        if self._touched is not None:
            self._touch(keys, self._touched)
        return tuple(map(self._resources.__getitem__, keys))

    def _touch(self, keys: tuple[Hashable, ...], touched: dict[Hashable, None]) -> None:
        if len(keys) > 1:
            self._may_share |= dict.fromkeys(keys)
        for key in keys:
            if key not in touched:
                touched[key] = None
                if self._attempt is not None and key not in self._memories:
                    self._keep(key, self._attempt)

    def is_again(self, before: Any) -> bool:
        """Return whether its load returned an object that *before* has too, which operations can change."""
        from geventbatch._values.copies import is_fixed

        if type(before) is not Composite:
            return False
        return any(before.has(key, one) and not is_fixed(one) for key, one in self._resources.items())

    def has(self, key: Hashable, resource: Any) -> bool:
        """Return whether it has that very *resource* at *key*."""
        return key in self._resources and self._resources[key] is resource

    # -- undoing --------------------------------------------------------------------------------------------

    def copy_from_now_on(self, attempt: Attempt) -> Composite:
        """Copy each resource before it is touched first. Return itself, which restores. Raise if nothing is copied."""
        if attempt.dispatcher.options.copy_resource is None:
            raise CannotUndo("copy_resource is None")
        self._attempt = attempt
        self._can_restore()
        return self

    def restored_by(self, scope: Any) -> Any:
        """Return what restores each resource by *scope*; or all together, if *scope* says that it does."""
        if getattr(scope, "restores_components", False):
            return _Whole(scope, self)
        touched = self._can_restore()
        for operation in self._component.operations:  # until now, nothing has kept which were applied
            found: Any = operation.callable
            if operation.state in {STARTED, BROKEN} and type(found) is At:
                self._touch(found.keys, touched)
        for key in self._resources:
            self._memories[key] = _OfScope(scope, self._component, key)
        return self

    def _can_restore(self) -> dict[Hashable, None]:
        touched = self._touched = {}
        self._memories, self._may_share, self._kept, self._lost = {}, {}, {}, {}
        return touched

    def let_go(self) -> None:
        """Drop the attempt, which refers to it: no cycle."""
        self._attempt = None

    def _keep(self, key: Hashable, attempt: Attempt) -> None:
        from geventbatch._values.copies import copies_of, needs_no_copy

        resource = self._resources[key]
        if needs_no_copy(attempt, resource):
            self._memories[key] = _Fixed(resource)
            return
        try:
            self._memories[key] = attempt.context.run(copies_of, attempt, resource)
        except Exception as error:
            self._lost[key] = error

    def checkpoint(self) -> object:
        """Keep the present state of what was touched since the last time, and return something that stands for it."""
        self._see_to_lost()
        touched: Any = self._touched
        kept = dict(self._kept)
        for key in touched:
            kept[key] = self._memories[key].checkpoint()
        self._kept = kept
        for key in self._may_share:  # an object that lies in two of them would be brought back in one of them only
            self._resources[key] = self._saved[key] = self._memories[key].restore(kept[key])
        self._may_share.clear()
        touched.clear()
        return kept

    def restore(self, checkpoint: object | None) -> Composite:  # noqa: ARG002 - it is always the last one
        """Bring back what was touched since *checkpoint*, the last one; None stands for the load. Return itself."""
        self._see_to_lost()
        touched: Any = self._touched
        for key in touched:
            self._resources[key] = self._saved[key] = self._memories[key].restore(self._kept.get(key))
        self._may_share.clear()
        touched.clear()
        return self

    def _see_to_lost(self) -> None:
        for key in self._touched or ():
            if key in self._lost:
                raise self._lost[key]


@final
class _OfScope:
    """One key of a scope that restores by itself, and asks the batch for the key."""

    def __init__(self, scope: Any, component: Component, key: Hashable) -> None:
        self._scope, self._component, self._key = scope, component, key

    def checkpoint(self) -> object:
        self._component.key, self._component.named = self._key, (self._key,)
        return self._scope.checkpoint()

    def restore(self, checkpoint: object | None) -> Any:
        self._component.key, self._component.named = self._key, (self._key,)
        return self._scope.restore(checkpoint)


@final
class _Whole:
    """A scope that restores all keys of a component together, in place."""

    def __init__(self, scope: Any, composite: Composite) -> None:
        self._scope, self._composite = scope, composite

    def checkpoint(self) -> object:
        return self._scope.checkpoint()

    def restore(self, checkpoint: object | None) -> Composite:
        self._scope.restore(checkpoint)
        return self._composite


@final
class _Fixed:
    """A resource that no operation can change."""

    def __init__(self, resource: Any) -> None:
        self._resource = resource

    def checkpoint(self) -> object:
        return self

    def restore(self, checkpoint: object | None) -> Any:  # noqa: ARG002 - the signature is that of `Undoes`
        return self._resource
