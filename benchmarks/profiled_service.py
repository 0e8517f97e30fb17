"""The service under cProfile: `python -m benchmarks.profiled_service STATS_FILE serve --no-migrate`.

SIGUSR1 begins the profile, and SIGUSR1 again ends it and writes the file, for `python -m pstats STATS_FILE`. It counts
CPU seconds of the main thread, where the event loop runs; what works in threads beside it is not seen.
"""

import cProfile
import signal
import sys
import time

from app.__main__ import main

if __name__ == "__main__":
    path = sys.argv.pop(1)
    profile = cProfile.Profile(time.thread_time)
    running = False

    def turn(_number: int, _frame: object) -> None:
        """Begin, or end and write."""
        global running  # noqa: PLW0603 -- a signal's handler has nothing else to remember it by
        running = not running
        if running:
            profile.enable()
        else:
            profile.disable()
            profile.dump_stats(path)

    signal.signal(signal.SIGUSR1, turn)
    main()
