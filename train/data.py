"""The data of a run's settings."""

from pathlib import Path

from data.module import TokenDataModule
from train.config import RunConfig


def data_of(
    config: RunConfig, *, cache_dir: Path | str | None = None, num_workers: int | None = None
) -> TokenDataModule:
    """The data module that ``config`` asks for, not set up yet; None is the config's own value."""
    return TokenDataModule(
        config.corpus,
        config.tokenizer,
        config.packing,
        cache_dir=config.cache_dir if cache_dir is None else cache_dir,
        data_seed=config.data_seed,
        num_workers=config.trainer.num_workers if num_workers is None else num_workers,
        canonical_rows=config.tracking.canonical_rows,
    )
