"""Arms the hook when a frozen program starts that was frozen with tfenv."""

from tfenv.runtime import emergency

try:
    from tfenv.runtime.arming import arm

    arm()
except ImportError as error:  # whoever froze the program left a part of tfenv out
    emergency.handle(error, "tfenv")
