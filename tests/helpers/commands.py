"""Calls of the command line."""

from __future__ import annotations

from gradmerge.cli import main


def fails(arguments, capsys):
    """The message of a command that stops with status 2, and nothing of a traceback."""
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    message = capsys.readouterr().err
    assert status == 2, message
    assert "Traceback" not in message
    return message
