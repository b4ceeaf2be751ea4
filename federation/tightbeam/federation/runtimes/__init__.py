"""Where a federation runs: in this process, on Ray, or on a SuperLink and SuperNodes."""
