"""The plot of `squeezed inspect`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from squeezed.context.record import ContextRecord
from squeezed.costs.inspection import check_picture, cluster_sizes
from squeezed.errors import SqueezedError
from squeezed.system.failures import cause_of


def plot(context: ContextRecord, budgets: Tensor, path: Path) -> None:
    """Write a picture: budget by layer and head `[layers, Hkv]`, and the cluster-size histogram."""
    check_picture(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    image = left.imshow(
        100 * budgets.T.numpy(), aspect="auto", interpolation="nearest", cmap="viridis"
    )
    left.set(xlabel="layer", ylabel="KV head", title="keys read exactly")
    left.set_yticks(range(budgets.shape[1]))
    figure.colorbar(image, ax=left, label="% of the clustered keys")
    sizes = cluster_sizes(context)
    right.hist(sizes.numpy(), bins=60, log=True, color="#31688e")
    right.set(xlabel="keys in a cluster", ylabel="clusters", title="cluster sizes, finest level")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise SqueezedError(
            f"plot: could not write {path} ({cause_of(error)}); choose another place"
        ) from error
    finally:
        pyplot.close(figure)
