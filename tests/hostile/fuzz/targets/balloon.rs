#![no_main]
libfuzzer_sys::fuzz_target!(|steps: Vec<bulkhead_fuzz::Step>| bulkhead_fuzz::drive(
    bulkhead_fuzz::Kind::Balloon,
    &steps
));
