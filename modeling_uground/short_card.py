"""The card that a bare `push_to_hub` leaves: what this is, how to load it, and that nothing more was told."""

from huggingface_hub import ModelCard, ModelCardData

TAGS = ["uground", "referring-segmentation", "reasoning-segmentation", "visual-grounding"]
UNRELATED = (
    "> `uground` is also the name of an unrelated GUI-grounding model, `OSU-NLP-Group/UGround`, "
    "which this one has nothing to do with."
)
# The Hub wants a licence named; what it is depends on parts that nobody told us of.
UNKNOWN_LICENCE = {"license": "other", "license_name": "see-licence-of-the-parts"}
BODY = """# {title}

An image and a sentence in, words and pixel masks out.

{unrelated}

```python
from transformers import pipeline

pipe = pipeline("referring-segmentation", model="{name}", trust_remote_code=True)
pipe("photo.jpg", "the red cup")
```

Where it comes from and what it was measured to do was not told; `python -m uground.hub.publish`
writes a card that says so.
"""


def short_card(repo_id: str | None) -> ModelCard:
    """The card of a model of which only its place on the Hub is known."""
    name = repo_id or "uground-checkpoint"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=list(TAGS),
        language="en",
        **UNKNOWN_LICENCE,
    )
    body = BODY.format(title=name.split("/")[-1], name=name, unrelated=UNRELATED)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=False)


def is_card_of_uground(content: str) -> bool:
    """Whether a card speaks of UGround, and is none of the empty ones that libraries write."""
    try:
        tags = ModelCard(content, ignore_metadata_errors=True).data.tags
    except Exception:  # the reader of YAML has errors of its own; whoever wrote this shall mend it
        return True
    return TAGS[0] in (tags or [])


__all__ = ["TAGS", "UNKNOWN_LICENCE", "UNRELATED", "is_card_of_uground", "short_card"]
