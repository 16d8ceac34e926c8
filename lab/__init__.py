"""What made the bundled weights, sets and figures."""

import iclora  # noqa: F401 - sees to what can happen to a command before its modules are loaded
