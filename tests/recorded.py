"Recorded vectors in tests: do they come out, and is a change noticed?"
import numpy as np

from golf_nb.interop.command import ALL_KINDS
from golf_nb.interop.vectors import Vectors, check_file

def misses(path):
    "The arrays of a file that do not agree; the file as a whole must have been compared."
    report = check_file(path, ALL_KINDS)
    wrong = {row[0] for row in report.rows if not row[1] <= row[2]}
    assert report.verdict != 'not compared' and not report.error, (report.error, report.not_compared)
    assert (report.verdict == 'pass') == (not wrong)
    return wrong


def misses_when_changed(path, array, folder):
    "The same after one of its arrays was moved by 1."
    arrays = Vectors(path).arrays
    arrays[array] = arrays[array] + np.asarray(1, arrays[array].dtype)
    copy = folder/path.parent.name/path.name
    copy.parent.mkdir()
    np.savez(copy, **arrays)
    return misses(copy)
