"""A worker that does nothing but live."""

import time

import seamark


@seamark.Wrapper()
def main(call: seamark.CallWrapper) -> None:
    while True:
        call.ping()
        time.sleep(1.0)


main()
