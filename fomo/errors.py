"""What ends a command early; the command line turns each into one line and an exit status."""


class UserError(ValueError):
    """A mistake in the arguments, the recipe or the data.

    The message is one line that names the file or field, what was found and what is accepted;
    the command line prints it without a traceback and exits with status 2. It often quotes names and values
    from elsewhere: what would break the line, or steer a terminal, is shown escaped.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class FieldError(UserError):
    """A wrong field of a recipe or data file; by `field`, its dotted path, the file that set it can be named."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field = field


class Failure(RuntimeError):
    """The work cannot go on; the message says where it stopped. Exit status 1."""


class Interrupted(Exception):
    """SIGTERM or Ctrl-C; raised at the next safe point."""

    def __init__(self, signum: int, saved: str = "nothing to save yet"):
        super().__init__(f"interrupted; {saved}")
        self.signum = signum
        self.exit_status = 128 + signum


def one_line(error: Exception) -> str:
    """What another library's error says, as part of one of our lines."""
    return " ".join(str(error).split())[:300] or type(error).__name__
