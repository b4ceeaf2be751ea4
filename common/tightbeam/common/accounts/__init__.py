"""What a step is and costs, agreed between edge and cloud: rows, framing, operations, prices."""
