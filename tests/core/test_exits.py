"""Exit codes."""

import signal

import pytest

from pfgm.core import exits


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_gives_its_exit_code_and_one_line(number, code, capsys):
    with pytest.raises(SystemExit) as error:
        exits.exit_for_signal(number)
    assert error.value.code == code
    assert capsys.readouterr().err == (
        f"stopped by {number.name}; files are whole, and the same command continues a run or a folder\n"
    )


def test_the_exit_code_of_a_lost_process_is_that_of_a_temporary_failure():
    assert exits.LOST == 75
