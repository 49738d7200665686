# Ring 0, all of it: from the PVH entry (or a start-up IPI) to ring 3 in long mode.
# Kept to moves, port-free and loop-light, because some hypervisors emulate every
# instruction that the guest runs in ring 0 and know only the common ones.
# Intel syntax. Through the whole file: ebp = vCPU index, esi = start info (0 on APs).

.set AP_BASE, 0x8000
.set TSS_END, 104 + 8192 + 1        # with a bitmap of all 65536 ports and its end marker

.section .note.pvh, "a", @note
    .balign 4
    .long 4                         # size of the name
    .long 8                         # size of the descriptor
    .long 18                        # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

.section .boot, "ax", @progbits
.code32
.globl pvh_start
pvh_start:
    cli
    cld
    mov esi, ebx
    xor ebp, ebp

    # Identity map of the first 4 GiB: 2 MiB pages, writable, user. Ring 3 adds the rest.
    lea eax, [pdpt + 7]
    mov dword ptr [pml4], eax
    lea edi, [pdpt]
    lea eax, [low_directories + 7]
    mov ecx, 4
2:
    mov dword ptr [edi], eax
    add eax, 4096
    add edi, 8
    dec ecx
    jnz 2b

    lea edi, [low_directories]
    mov eax, 0x87                   # present, writable, user, 2 MiB
    mov ecx, 2048
3:
    mov dword ptr [edi], eax
    add eax, 0x200000
    add edi, 8
    dec ecx
    jnz 3b

enter_long_mode:
    mov eax, cr4
    or eax, 0x620                   # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    lea eax, [pml4]
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER
    rdmsr
    or eax, 0x100                   # LME
    wrmsr
    lgdt [gdt_pointer]
    lidt [empty_idt_pointer]
    mov eax, cr0
    and eax, 0x9ffffff3             # not CD, NW, TS, EM
    or eax, 0x80000023              # PG, NE, MP, PE
    mov cr0, eax
    .byte 0xea                      # far jump into 64-bit code
    .long long_mode
    .word 0x10

.code64
long_mode:
    mov eax, 0x18
    mov ss, eax
    mov eax, ebp
    inc eax
    shl eax, 14                     # 16 KiB of stack for each vCPU
    lea rsp, [stacks]
    add rsp, rax

    # kvmclock, if the hypervisor is KVM and offers it. r8d = "it is on".
    xor r8d, r8d
    mov eax, 0x40000000
    cpuid
    cmp ebx, 0x4b4d564b             # "KVMK"
    jne 4f
    cmp ecx, 0x564b4d56             # "VMKV"
    jne 4f
    cmp edx, 0x4d                   # "M"
    jne 4f
    mov eax, 0x40000001
    cpuid
    test eax, 8                     # KVM_FEATURE_CLOCKSOURCE2
    jz 4f
    mov eax, ebp
    shl eax, 6                      # 64 bytes for each vCPU
    lea rdx, [kvmclock_pages]
    add eax, edx
    or eax, 1
    xor edx, edx
    mov ecx, 0x4b564d01             # MSR_KVM_SYSTEM_TIME_NEW
    wrmsr
    mov r8d, 1
4:
    # A task state segment whose I/O bitmap, all zero, allows every port: not every
    # hypervisor carries IOPL 3 into ring 3. It is shared, since no vCPU ever returns to
    # ring 0 and so none needs a stack from it; vCPUs come here one after the other.
    lea rax, [tss]
    mov word ptr [gdt_tss], TSS_END - 1
    mov word ptr [gdt_tss + 2], ax
    shr eax, 16
    mov byte ptr [gdt_tss + 4], al
    mov byte ptr [gdt_tss + 5], 0x89
    mov byte ptr [gdt_tss + 7], ah
    mov word ptr [tss + 102], 104
    mov byte ptr [tss + TSS_END - 1], 0xff
    mov eax, 0x38
    ltr ax

    mov eax, 0x2b
    mov ds, eax
    mov es, eax
    mov rax, rsp
    push 0x2b                       # ss
    push rax                        # rsp
    push 0x3002                     # rflags: IOPL 3, interrupts off
    push 0x33                       # cs
    lea rax, [ring3]
    push rax
    iretq

# First instructions of ring 3: run_vcpu(index, start info, kvmclock is on).
ring3:
    mov edi, ebp
    mov esi, esi
    mov edx, r8d
    xor ebp, ebp
    call run_vcpu
    ud2

# Copied to AP_BASE, where a start-up IPI begins in real mode with cs = AP_BASE / 16.
.code16
.globl ap_trampoline
ap_trampoline:
    cli
    cld
    xor ax, ax
    mov ds, ax
    .byte 0x0f, 0x01, 0x16          # lgdt [word]
    .word AP_BASE + (ap_gdt_pointer - ap_trampoline)
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea                # far jump into 32-bit code
    .long ap_protected
    .word 0x08
.balign 4
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
.globl ap_trampoline_end
ap_trampoline_end:

.code32
ap_protected:
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov ebp, dword ptr [starting_vcpu]
    xor esi, esi
    jmp enter_long_mode
.code64

.section .data.boot, "aw", @progbits
.balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # 0x08 ring 0 code, 32-bit
    .quad 0x00af9b000000ffff        # 0x10 ring 0 code, 64-bit
    .quad 0x00cf93000000ffff        # 0x18 ring 0 data
    .quad 0x00cffb000000ffff        # 0x23 ring 3 code, 32-bit (never used)
    .quad 0x00cff3000000ffff        # 0x2b ring 3 data
    .quad 0x00affb000000ffff        # 0x33 ring 3 code, 64-bit
gdt_tss:
    .quad 0, 0                      # 0x38 filled in at run time
gdt_end:
.balign 8
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
# No handler exists: any exception is a triple fault, which the VMM must notice.
.balign 8
empty_idt_pointer:
    .word 0
    .quad 0

.section .bss.boot, "aw", @nobits
.balign 4096
.globl pml4
pml4:
    .skip 4096
.globl pdpt
pdpt:
    .skip 4096
low_directories:
    .skip 4 * 4096
tss:
    .skip 12288
stacks:
    .skip 16 * 16384
