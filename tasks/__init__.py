"""What the stages do: files in, files out."""

import os
import sys

# Where a disk is full Python 3.11 puts half of a compiled file in place (python/cpython#126606); whatever imports that
# later, when there is room again, ends with "marshal data too short".
_ROOM = 2**24
_disk = os.statvfs(os.path.dirname(__file__))
if _disk.f_bavail * _disk.f_frsize < _ROOM:
    sys.dont_write_bytecode = True
