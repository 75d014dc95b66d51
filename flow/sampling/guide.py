"""The guide of autoguidance: a weaker model whose velocity the guided one leads away from."""

from copy import deepcopy
from pathlib import Path

from configs.errors import UserError
from configs.schema import Config, SourceConfig
from flow.model import FlowModel
from flow.runtime.errors import renaming
from flow.sampling import header, snapshot
from flow.sampling.snapshot import Snapshot


def attach(model: FlowModel, snap: Snapshot, weights: str | Path | None) -> str | None:
    """Give `model`, which was built of `snap`, the guide behind --guide_weights, and name it for `SamplerSettings`. Without
    weights there is no guide: None.

    A smaller or shorter trained network of the same data works best, with its own averaging length (Karras et al. 2024,
    arXiv:2406.02507). One without labels guides as in classifier-free guidance. Its path and prediction may differ.

    Raises:
        UserError: for a guide of other images, classes or prompts, of another source, or with another number of times.
    """
    if weights is None:
        return None
    key = f"--guide_weights {weights}"
    with renaming("--weights ", "--guide_weights "):
        guide = snapshot.load(weights)
    if guide.image_shape != snap.image_shape:
        raise UserError(f"{key}: is a model of images of {guide.image_shape}, --weights of {snap.image_shape}")
    snapshot.check_codec(key, guide, snap.codec)
    source, own_source = (_source_without_places(each.config) for each in (guide, snap))
    if source != own_source:
        starts = [" ".join([each.name, *([str(each.args)] if each.args else [])]) for each in (source, own_source)]
        raise UserError(f"{key}: starts at {starts[0]}, --weights at {starts[1]}; give one of the same flow.source")
    with renaming("--weights ", "--guide_weights "):
        weaker = guide.model(decode=False)
    if weaker.net.two_times != model.net.two_times:
        kinds = ["a flow map" if net.two_times else "a flow" for net in (weaker.net, model.net)]
        raise UserError(f"{key}: is {kinds[0]}, --weights {kinds[1]}; give one of the same kind")
    own, other = ((net.num_classes, net.max_prompt_bytes) for net in (model.net, weaker.net))
    if other not in (own, (None, None)) or (other != (None, None) and guide.class_names != snap.class_names):
        raise UserError(f"{key}: was trained with other classes or prompts than --weights")
    model.guide = weaker
    return name_of(guide, weights)


def _source_without_places(config: Config) -> SourceConfig:
    """flow.source, but for where it lies: a run and its export, or two machines, have it in other places."""
    copy = deepcopy(config)
    header.take_places(copy, {})
    return copy.flow.source


def name_of(guide: Snapshot, weights: str | Path) -> str:
    """What a guide is called in tables and settings."""
    return f"{guide.title(weights)} ({guide.sha256[:12]})"
