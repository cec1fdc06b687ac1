//! Links the program as a kernel: at a fixed address, without a C library.

fn main() {
    let folder = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let script = format!("-Wl,-T,{folder}/kernel.ld,--build-id=none,-z,norelro");
    for argument in ["-nostdlib", "-nostartfiles", "-static", "-no-pie", &script] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rerun-if-changed=kernel.ld");
}
