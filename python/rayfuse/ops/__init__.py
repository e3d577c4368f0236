"""One module a differentiable op."""

from typing import TYPE_CHECKING, Any

from ..stems import public

# what is found below, for those who import it from here
if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


STEMS, __all__ = public(__name__, __path__, globals())
