"""The progress of long work, on standard error."""

import math
import sys

from tqdm import tqdm

LINE_SECONDS = 60  # between lines where there is no terminal


class Progress(tqdm):
    """tqdm's bar. Where standard error is no terminal, a line a minute; of work that is done sooner nothing."""

    shown = math.inf  # when the last line was written

    def __init__(self, *args, **kwargs):
        self.lines = not sys.stderr.isatty()
        super().__init__(*args, **kwargs)
        if self.lines and not self.disable:
            self.shown, self.sp = self.start_t, None  # without a printer tqdm closes without a word

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self.lines:
            return super().display(msg, pos)
        now = self._time()
        if now - self.shown >= LINE_SECONDS:
            self.shown = now
            print(self, file=self.fp, flush=True)
        return True

    def clear(self, nolock: bool = False) -> None:
        """Make room for other text, which lines do not need."""
        if not self.lines:
            super().clear(nolock)
