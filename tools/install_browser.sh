#!/bin/sh
# Set-up of the browser test: makes sure that Chromium and its driver are installed.
# Where that is impossible it says why and succeeds; the test then skips with the same reason.
set -u

has_browser() {
    { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null 2>&1 &&
        command -v chromedriver >/dev/null 2>&1
}

skip() {
    echo "The browser test will be skipped: $1." >&2
    exit 0
}

has_browser && exit 0

if [ "$(id -u)" -eq 0 ]; then
    as_root=""
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    skip "Chromium and chromedriver are not installed, and installing them takes root or sudo without a password"
fi
command -v apt-get >/dev/null 2>&1 ||
    skip "Chromium and chromedriver are not installed, and this system has no apt-get to install them with"

echo "Installing Chromium for the browser test ..."
# Debian calls the driver chromium-driver, Ubuntu chromium-chromedriver.
install() {
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends "$@"
}
log=$(mktemp)
if ! { $as_root apt-get update --quiet &&
    { install chromium chromium-driver || install chromium-browser chromium-chromedriver; }; } >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    rm -f "$log"
    skip "apt-get could not install Chromium and chromedriver"
fi
rm -f "$log"
has_browser || skip "apt-get installed no usable Chromium and chromedriver"
