"""What goes to the Hub: checkpoints, adapters, cards, and the pushes of a trainer."""

from uground.hub.publish.publishing import main, publish

__all__ = ["main", "publish"]
