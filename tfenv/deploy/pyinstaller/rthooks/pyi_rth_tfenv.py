"""Arms the hook when a frozen program starts that was frozen with tfenv."""

from tfenv.runtime.arming import arm

arm()
