"""Ranks whose host downloads the checkpoint from a hub into its own cache before they load it."""

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.doctor.facts import Need
from cluster.worker import ModelRankLauncher, OnProgress, Rank
from engine.load_stats import LoadStats
from parallel.topology import Topology
from serve.model_source import download_if_needed, needs_download

TELL_S = 5.0


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """Keep-alive progress during a download; the hubs' libraries report no fraction."""

    phase: str = "fetching the checkpoint"
    done: int = 0
    total: int = 1
    read: LoadStats | None = None


@dataclass(frozen=True, kw_only=True)
class DownloadingRankLauncher:
    """Like ``launcher``, but its checkpoint, adapter and draft model may be locations that `download_if_needed` downloads first."""

    launcher: ModelRankLauncher

    @property
    def topology(self) -> Topology:
        return self.launcher.topology

    @property
    def need(self) -> Need:
        return self.launcher.need

    def check_host(self) -> None:
        self.launcher.check_host()

    def start(self, *, rank: int, rendezvous: str | None, ranks_on_host: int, on_progress: OnProgress) -> AbstractContextManager[Rank]:
        launcher = replace(self.launcher, checkpoint_folder=_download(self.launcher.checkpoint_folder, on_progress))
        if launcher.adapter is not None:
            launcher = replace(launcher, adapter=_download(launcher.adapter, on_progress))
        if (draft := launcher.runner_config.draft_model) is not None:
            runner_config = replace(launcher.runner_config, draft_model=str(_download(draft, on_progress)))
            launcher = replace(launcher, runner_config=runner_config)
        return launcher.start(rank=rank, rendezvous=rendezvous, ranks_on_host=ranks_on_host, on_progress=on_progress)


def _download(location: Path | str, on_progress: OnProgress) -> Path | str:
    """Download if needed. Ranks of one host may do so at the same time: the hubs' caches lock, so that each file is fetched once."""
    if not needs_download(location):
        return location
    with ThreadPoolExecutor(1) as thread:
        fetching = thread.submit(download_if_needed, location)
        while True:
            on_progress(DownloadProgress())
            try:
                return fetching.result(TELL_S)
            except NotYet:
                if fetching.done():  # the download itself raised TimeoutError
                    raise
