//! What the shim and the operator's command read of an agent, and the agent of them: lines, frames, messages.
#![no_main]

use bulkhead_protocol::agent::{
    GrowResponse, ListPidsResponse, ListResponse, ProcessResponse, StatsResponse, WaitResponse,
    WatchPortsResponse,
};
use bulkhead_protocol::{
    debug::{self, DebugHeader},
    forward::{ForwardHeader, parse_answer},
    id,
    stream::StreamHeader,
};
use protobuf::Message;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((kind, bytes)) = data.split_first() else {
        return;
    };
    match kind % 13 {
        0 => drop(parse_answer(bytes)),
        1 => {
            if let Ok(header) = ForwardHeader::parse(bytes) {
                let line = header.encode();
                assert!(ForwardHeader::parse(line.trim_end().as_bytes()).is_ok());
            }
        }
        2 => drop(std::str::from_utf8(bytes).map(id::is_valid)),
        3 => drop(StatsResponse::parse_from_bytes(bytes)),
        4 => drop(ListResponse::parse_from_bytes(bytes)),
        5 => drop(ListPidsResponse::parse_from_bytes(bytes)),
        6 => drop(WatchPortsResponse::parse_from_bytes(bytes)),
        7 => drop(GrowResponse::parse_from_bytes(bytes)),
        8 => drop(WaitResponse::parse_from_bytes(bytes)),
        9 => drop(ProcessResponse::parse_from_bytes(bytes)),
        10 => {
            if let Ok(Some((_, used))) = StreamHeader::parse(bytes) {
                assert!(used <= bytes.len());
            }
        }
        11 => drop(DebugHeader::parse(bytes)),
        _ => {
            if let Some(head) = bytes.first_chunk() {
                drop(debug::parse_head(*head));
            }
            let _ = debug::size(bytes);
        }
    }
});
