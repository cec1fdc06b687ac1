//! Generates messages from `proto/cri.proto` with the pure-Rust parser (no protoc).

use std::{env, fs, path::Path};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo:rerun-if-changed=proto/cri.proto");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    Codegen::new()
        .out_dir(&out)
        .input("proto/cri.proto")
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize {
            gen_mod: false,
            ..Customize::default()
        })
        .run()
        .expect("generating code from cri.proto");
    // `include!` takes no inner attributes and no inner doc comments.
    let file = Path::new(&out).join("cri.rs");
    let text = fs::read_to_string(&file).expect("reading generated code");
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .collect();
    fs::write(file, kept.join("\n")).expect("writing generated code");
}
