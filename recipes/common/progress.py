"""One progress bar for long work: count, rate and time left, on stderr, silent where no one watches."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Rate(ProgressColumn):
    """Steps per second over the last moments."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


class Bar:
    """`with Bar("indexing", total) as bar: bar.step(); bar.say("a line above the bar")`."""

    def __init__(self, title: str, total: int | None) -> None:
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate()
        self.progress = Progress(
            *columns,
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            redirect_stdout=False,
        )
        self.task = self.progress.add_task(title, total=total)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, count: int = 1) -> None:
        self.progress.advance(self.task, count)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)
