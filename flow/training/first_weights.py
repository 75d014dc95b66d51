"""The weights that a new run takes from another one, whose classes may be others."""

from collections.abc import Sequence

from torch import Tensor, nn

from flow.runtime.messages import first_names
from flow.sampling.snapshot import Snapshot

NEW = "step_embedding."  # weights that a flow lacks when it becomes a flow map
LABELS = "label_embedding.weight"  # [classes + 1, d], the last row that of no label


def load(source: Snapshot, net: nn.Module, class_names: Sequence[str]) -> list[str]:
    """Load the weights of a snapshot into a network that is to be trained on these classes (none: without labels); returns
    lines for the log about what starts anew.

    A class takes the embedding of the class of its name, others start anew; so does all that makes a flow a flow map.
    Raises UserError as `Snapshot.check_fit`.
    """
    own, weights = net.state_dict(), dict(source.weights)
    new_steps = {name: value for name, value in own.items() if NEW in name and name not in weights}
    weights |= new_steps
    notes = ["the embedding of the length of a step starts anew"] if new_steps else []
    for name in [name for name in {**own, **weights} if name.endswith(LABELS)]:
        table, new = _label_table(own.get(name), weights.pop(name, None), source.class_names, tuple(class_names))
        weights |= {name: table} if table is not None else {}
        notes += new
    source.check_fit(net, weights)
    net.load_state_dict(weights)
    return notes


def _label_table(
    own: Tensor | None, trained: Tensor | None, before: tuple[str, ...], class_names: tuple[str, ...]
) -> tuple[Tensor | None, list[str]]:
    """The embeddings [classes + 1, d] of a network on `class_names`, None without labels, and lines about what starts anew.

    own: those of the new network. trained, before: embeddings and classes of the snapshot.
    """
    if own is None:
        return None, ["was trained with labels, which are left out here"]
    if trained is None:
        return own, ["was trained without labels; their embeddings start anew"]
    same = before == class_names and own.shape == trained.shape
    if same or not before or not class_names or own.shape[1:] != trained.shape[1:]:
        return trained, []  # without names the shapes decide, which `check_fit` compares
    new = [name for name in class_names if name not in before]
    missing = [name for name in before if name not in class_names]
    notes = [f"the embeddings of the classes {first_names(new)} start anew"] if new else []
    notes += [f"the embeddings of the classes {first_names(missing)} are left out"] if missing else []
    return _by_name(own, trained, before, class_names), notes


def _by_name(table: Tensor, other: Tensor, before: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """The rows of `other` for the classes that both have, and for no label; the rows of `table` for the rest."""
    rows = {name: k for k, name in enumerate(before)}
    table = table.clone()
    for k, name in enumerate(class_names):
        if name in rows:
            table[k] = other[rows[name]]
    table[-1] = other[-1]
    return table
