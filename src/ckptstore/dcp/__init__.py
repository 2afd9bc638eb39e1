"""The torch side: what a trainer's objects hold, who writes which part of it, and how it gets back in.

Owns the meeting of live torch objects with names and boxes: binding, planning, agreement between ranks, copying into an
arena, matching a target, filling it. Must not know files, remotes, agents or the order of saves: it is given buffers to
fill and a source of verified chunks. The only room besides the store where torch is imported.
"""
