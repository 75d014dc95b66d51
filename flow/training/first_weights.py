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
    before = source.class_names
    notes = ["the embedding of the length of a step starts anew"] if new_steps else []
    for name in (name for name in {**own, **weights} if name.endswith(LABELS)):
        table, other = own.get(name), weights.pop(name, None)
        if table is None or other is None:
            notes += ["was trained with labels, which are left out here"] if table is None else []
            notes += ["was trained without labels; their embeddings start anew"] if other is None else []
        elif not before or not class_names or table.shape[1:] != other.shape[1:]:
            table = other  # what has no names is taken where the shape is the same
        elif before != tuple(class_names) or table.shape != other.shape:
            table = _by_name(table, other, before, class_names)
            new = [each for each in class_names if each not in before]
            missing = [each for each in before if each not in class_names]
            notes += [f"the embeddings of the classes {first_names(new)} start anew"] if new else []
            notes += [f"the embeddings of the classes {first_names(missing)} are left out"] if missing else []
        else:
            table = other
        if table is not None:
            weights[name] = table
    source.check_fit(net, weights)
    net.load_state_dict(weights)
    return notes


def _by_name(table: Tensor, other: Tensor, before: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """The rows of `other` for the classes that both have, and for no label; the rows of `table` for the rest."""
    rows = {name: k for k, name in enumerate(before)}
    table = table.clone()
    for k, name in enumerate(class_names):
        if name in rows:
            table[k] = other[rows[name]]
    table[-1] = other[-1]
    return table
