"""What this package costs and brings, measured: run from the repository's root as ``python -m benchmarks.cpu.suite``.

``cpu`` and ``gpu`` hold speed, ``quality`` what compression leaves of real networks, ``common`` what all of them need,
``results`` what was measured.
"""
