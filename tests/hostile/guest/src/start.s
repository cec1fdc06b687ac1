# Two ways in: 64-bit long mode from our VMM (Linux boot protocol), 32-bit protected mode from the emulator (PVH).
    .section .note.pvh, "a"
    .balign 4
    .long 4, 4, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start32

    .text
    .code32
    .global start32
start32:
    cli
    mov $tables + 0x2000, %edi  # four pages of 2 MiB entries: 4 GiB
    mov $0x83, %eax
    mov $2048, %ecx
1:  mov %eax, (%edi)
    movl $0, 4(%edi)
    add $0x200000, %eax
    add $8, %edi
    loop 1b
    mov $tables + 0x1000, %edi
    mov $tables + 0x2003, %eax
    mov $4, %ecx
2:  mov %eax, (%edi)
    add $0x1000, %eax
    add $8, %edi
    loop 2b
    movl $tables + 0x1003, tables
    mov $tables, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax              # PAE
    mov %eax, %cr4
    mov $0xc0000080, %ecx       # EFER.LME
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $start64

    .code64
    .global start64
start64:
    cli
    lgdt gdt_pointer(%rip)
    mov $16, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    mov $stack_end, %rsp
    mov $tables + 0x2000, %edi
    mov $0x83, %eax
    mov $2048, %ecx
3:  mov %rax, (%rdi)
    add $0x200000, %rax
    add $8, %rdi
    loop 3b
    mov $tables + 0x1000, %edi
    mov $tables + 0x2003, %eax
    mov $4, %ecx
4:  mov %rax, (%rdi)
    add $0x1000, %rax
    add $8, %rdi
    loop 4b
    mov $tables + 0x1003, %eax
    mov %rax, tables
    mov $tables, %eax
    mov %rax, %cr3
    mov %cr0, %rax
    and $~4, %rax               # no EM
    or $2, %rax
    mov %rax, %cr0
    mov %cr4, %rax
    or $0x600, %rax             # SSE, which the compiler uses
    mov %rax, %cr4
    call kernel_main
5:  hlt
    jmp 5b

    .data
    .balign 8
gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word 23
    .quad gdt

    .bss
    .balign 4096
tables:
    .skip 0x6000
    .skip 0x10000
stack_end:
