// Where every field of the structs of abi.hpp lies, for library.py to compare with its own: an
// order of fields that differs would not change any size.
#include "abi.hpp"

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace cumulant {
namespace {

typedef std::vector<std::pair<const char*, size_t>> Layout;

#define FIELD(name) {#name, offsetof(Struct, name)}

Layout layout(const Array*) {
  typedef Array Struct;
  return {FIELD(data), FIELD(batch), FIELD(head), FIELD(row)};
}
Layout layout(const Attention*) {
  typedef Attention Struct;
  return {FIELD(B),
          FIELD(N),
          FIELD(H),
          FIELD(G),
          FIELD(T),
          FIELD(S),
          FIELD(K),
          FIELD(V),
          FIELD(F),
          FIELD(chunk),
          FIELD(span),
          FIELD(type),
          FIELD(order),
          FIELD(constant_term),
          FIELD(activation),
          FIELD(normalize),
          FIELD(is_causal),
          FIELD(threads),
          FIELD(isa),
          FIELD(decay_type),
          FIELD(scale),
          FIELD(query),
          FIELD(key),
          FIELD(value),
          FIELD(out),
          FIELD(log_decay),
          FIELD(key_mask),
          FIELD(offsets),
          FIELD(numerator),
          FIELD(denominator),
          FIELD(final_numerator),
          FIELD(final_denominator),
          FIELD(denominators),
          FIELD(dout),
          FIELD(dquery),
          FIELD(dkey),
          FIELD(dvalue),
          FIELD(dfinal_numerator),
          FIELD(dfinal_denominator),
          FIELD(dnumerator),
          FIELD(ddenominator),
          FIELD(dlog_decay)};
}
Layout layout(const Addresses*) {
  typedef Addresses Struct;
  return {FIELD(query),
          FIELD(key),
          FIELD(value),
          FIELD(log_decay),
          FIELD(numerator),
          FIELD(denominator),
          FIELD(out),
          FIELD(denominators),
          FIELD(final_numerator),
          FIELD(final_denominator)};
}
Layout layout(const GradientAddresses*) {
  typedef GradientAddresses Struct;
  return {FIELD(forward),      FIELD(dquery),           FIELD(dkey),
          FIELD(dvalue),       FIELD(dlog_decay),       FIELD(dnumerator),
          FIELD(ddenominator), FIELD(dfinal_numerator), FIELD(dfinal_denominator),
          FIELD(dout)};
}
Layout layout(const Elita*) {
  typedef Elita Struct;
  return {FIELD(B),
          FIELD(H),
          FIELD(G),
          FIELD(T),
          FIELD(V),
          FIELD(span),
          FIELD(type),
          FIELD(logits),
          FIELD(gates),
          FIELD(threads),
          FIELD(isa),
          FIELD(value),
          FIELD(out),
          FIELD(key_logit),
          FIELD(query_logit),
          FIELD(self_logit),
          FIELD(first),
          FIELD(key_odds),
          FIELD(own_odds),
          FIELD(means),
          FIELD(log_weight),
          FIELD(mean),
          FIELD(final_log_weight),
          FIELD(final_mean),
          FIELD(dout),
          FIELD(dvalue),
          FIELD(dkey_logit),
          FIELD(dself_logit),
          FIELD(dfinal_log_weight),
          FIELD(dfinal_mean),
          FIELD(dlog_weight),
          FIELD(dmean)};
}
Layout layout(const MixedChunk*) {
  typedef MixedChunk Struct;
  return {FIELD(B),
          FIELD(N),
          FIELD(H),
          FIELD(G),
          FIELD(T),
          FIELD(K),
          FIELD(L),
          FIELD(V),
          FIELD(size),
          FIELD(span),
          FIELD(type),
          FIELD(activation),
          FIELD(is_causal),
          FIELD(summed),
          FIELD(biases),
          FIELD(threads),
          FIELD(isa),
          FIELD(quad_query),
          FIELD(quad_key),
          FIELD(lin_query),
          FIELD(lin_key),
          FIELD(value),
          FIELD(out),
          FIELD(index),
          FIELD(bounds),
          FIELD(open_quad_key),
          FIELD(open_lin_key),
          FIELD(open_value),
          FIELD(bias),
          FIELD(bias_transposed),
          FIELD(numerator),
          FIELD(final_numerator),
          FIELD(final_quad_key),
          FIELD(final_lin_key),
          FIELD(final_value),
          FIELD(dout),
          FIELD(dquad_query),
          FIELD(dquad_key),
          FIELD(dlin_query),
          FIELD(dlin_key),
          FIELD(dvalue),
          FIELD(dfinal_numerator),
          FIELD(dfinal_quad_key),
          FIELD(dfinal_lin_key),
          FIELD(dfinal_value),
          FIELD(dnumerator),
          FIELD(dopen_quad_key),
          FIELD(dopen_lin_key),
          FIELD(dopen_value)};
}
Layout layout(const Pointwise*) {
  typedef Pointwise Struct;
  return {FIELD(operation), FIELD(threads), FIELD(isa),     FIELD(back),   FIELD(B),
          FIELD(T),         FIELD(H),       FIELD(n),       FIELD(taps),   FIELD(x),
          FIELD(out),       FIELD(dout),    FIELD(dx),      FIELD(second), FIELD(weight),
          FIELD(tail),      FIELD(dsecond), FIELD(dweight), FIELD(dtail),  FIELD(factors),
          FIELD(offset),    FIELD(cosine),  FIELD(sine),    FIELD(angles), FIELD(epsilon)};
}
Layout layout(const Instruction*) {
  typedef Instruction Struct;
  return {FIELD(operation), FIELD(kind),      FIELD(source),     FIELD(second), FIELD(third),
          FIELD(fourth),    FIELD(target),    FIELD(n),          FIELD(k),      FIELD(weight),
          FIELD(bias),      FIELD(scales),    FIELD(amplitudes), FIELD(scalar), FIELD(state),
          FIELD(add),       FIELD(bits),      FIELD(type),       FIELD(groups), FIELD(past),
          FIELD(rotated),   FIELD(attention), FIELD(mixed),      FIELD(buckets)};
}
Layout layout(const Past*) {
  typedef Past Struct;
  return {FIELD(length), FIELD(capacity), FIELD(dropped), FIELD(new_capacity),
          FIELD(seen),   FIELD(first),    FIELD(lengths)};
}
Layout layout(const Program*) {
  typedef Program Struct;
  return {FIELD(B),        FIELD(width),    FIELD(count), FIELD(inputs), FIELD(output),
          FIELD(outputs),  FIELD(threads),  FIELD(isa),   FIELD(type),   FIELD(instructions),
          FIELD(position), FIELD(input),    FIELD(out),   FIELD(before), FIELD(after),
          FIELD(pasts),    FIELD(separate), FIELD(slots), FIELD(wanted), FIELD(wanted_count),
          FIELD(tail)};
}

Layout layout(const Quantized*) {
  typedef Quantized Struct;
  return {FIELD(n),   FIELD(k),     FIELD(bits),   FIELD(threads),
          FIELD(isa), FIELD(codes), FIELD(scales), FIELD(out)};
}
Layout layout(const QuantizedProduct*) {
  typedef QuantizedProduct Struct;
  return {FIELD(T),     FIELD(n),      FIELD(k),    FIELD(bits), FIELD(threads), FIELD(isa),
          FIELD(codes), FIELD(scales), FIELD(bias), FIELD(x),    FIELD(out)};
}

template <class Struct> void add(std::string& to, const char* name) {
  to += name;
  for (const auto& field : layout(static_cast<const Struct*>(nullptr))) {
    to += std::string(" ") + field.first + ":" + std::to_string(field.second);
  }
  to += " size:" + std::to_string(sizeof(Struct)) + "\n";
}

}  // namespace
}  // namespace cumulant

extern "C" {
// A line for each struct: its name, its fields with their offsets, its size.
const char* cumulant_layout() {
  static const std::string layout = [] {
    std::string to;
    cumulant::add<cumulant::Array>(to, "Array");
    cumulant::add<cumulant::Attention>(to, "Attention");
    cumulant::add<cumulant::Addresses>(to, "Addresses");
    cumulant::add<cumulant::GradientAddresses>(to, "GradientAddresses");
    cumulant::add<cumulant::Elita>(to, "Elita");
    cumulant::add<cumulant::MixedChunk>(to, "MixedChunk");
    cumulant::add<cumulant::Pointwise>(to, "Pointwise");
    cumulant::add<cumulant::Instruction>(to, "Instruction");
    cumulant::add<cumulant::Past>(to, "Past");
    cumulant::add<cumulant::Program>(to, "Program");
    cumulant::add<cumulant::Quantized>(to, "Quantized");
    cumulant::add<cumulant::QuantizedProduct>(to, "QuantizedProduct");
    return to;
  }();
  return layout.c_str();
}
}
